"""The rotary embedding against plain autograd, and its inverse."""

import pytest
import torch
from kernel_truth import assert_exact, assert_no_worse

from mst_kernels import apply_rope_, rope, row_blocks


def plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x cos + rotate_half(x) sin with tables as wide as x, in the tables' dtype, rounded once."""
    wide = x.to(cos.dtype)
    cos, sin = (torch.cat([table, table], dim=-1)[..., None, :] for table in (cos, sin))
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def make(shape, dtype, device, batched=False) -> tuple[torch.Tensor, ...]:
    """x [B, S, H, E] and the two tables [S, E/2], or [B, S, E/2] where batched."""
    B, S, _, E = shape
    angles = 3 * torch.randn(*([B] if batched else []), S, E // 2, dtype=torch.float64)
    table = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, dtype=dtype, device=device)
    return x, angles.cos().to(device, table), angles.sin().to(device, table)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("block_elements", [1, 100, 1 << 20])
def test_float64_is_exact(batched, block_elements, monkeypatch) -> None:
    monkeypatch.setattr(row_blocks, "_CPU_BLOCK_ELEMENTS", block_elements)
    x, cos, sin = make((2, 5, 3, 10), torch.float64, torch.device("cpu"), batched)
    expected = plain(x, cos, sin)
    rotated = apply_rope_(x.clone(), cos, sin)
    assert_exact("rotated", rotated, expected)
    assert_exact("turned back", apply_rope_(rotated, cos, sin, inverse=True), x)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 3, 10), (1, 41, 1, 64), (1, 1, 1, 2), (2, 3, 70, 128)])
def test_no_worse_than_plain(implementation, device, batched, dtype, shape) -> None:
    x, cos, sin = make(shape, dtype, device, batched)
    for inverse in (False, True):
        turn = -sin if inverse else sin
        assert_no_worse(
            f"inverse={inverse}",
            apply_rope_(x.clone(), cos, sin, inverse),
            plain(x, cos, turn),
            plain(x.double(), cos.double(), turn.double()),
        )


def test_heads_first_in_memory(implementation, device) -> None:
    """x may be a transposed view of [B, H, S, E], or a slice of a fused projection's output."""
    x, cos, sin = make((2, 5, 3, 10), torch.float32, device)
    expected = plain(x, cos, sin)
    heads_first = x.transpose(1, 2).contiguous()
    torch.testing.assert_close(apply_rope_(heads_first.transpose(1, 2), cos, sin), expected)
    fused = torch.cat([x, x], dim=2)
    apply_rope_(fused[:, :, :3], cos, sin)
    torch.testing.assert_close(fused, torch.cat([expected, x], dim=2))


def test_values_and_gradients(implementation, device) -> None:
    """Through a projection's output seen as heads, as an attention layer calls it."""
    x, cos, sin = make((2, 5, 3, 10), torch.float32, device)
    q_weight = torch.randn(30, 30, device=device, requires_grad=True)
    k_weight = torch.randn(10, 30, device=device, requires_grad=True)
    hidden = x.flatten(2).requires_grad_()

    def loss(function) -> torch.Tensor:
        q = (hidden @ q_weight.T).view(2, 5, 3, 10)
        k = (hidden @ k_weight.T).view(2, 5, 1, 10)
        q, k = function(q, k)
        return (q * k).square().sum() + q.sum()

    def reference(q, k):
        return plain(q, cos, sin), plain(k, cos, sin)

    leaves = (hidden, q_weight, k_weight)
    actual, expected = loss(lambda q, k: rope(q, k, cos, sin)), loss(reference)
    torch.testing.assert_close(actual, expected)
    for name, got, truth in zip(
        ("hidden", "q_weight", "k_weight"),
        torch.autograd.grad(actual, leaves),
        torch.autograd.grad(expected, leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, truth, msg=lambda m, name=name: f"{name}: {m}")


def test_gradcheck() -> None:
    q, cos, sin = make((2, 3, 2, 6), torch.float64, torch.device("cpu"))
    k = torch.randn(2, 3, 1, 6, dtype=torch.float64)

    def function(q, k):
        return rope(q.clone(), k.clone(), cos, sin)

    assert torch.autograd.gradcheck(function, (q.requires_grad_(), k.requires_grad_()))


def test_works_in_place_but_not_on_the_gradient(implementation, device) -> None:
    x, cos, sin = make((1, 5, 2, 8), torch.float32, device)
    leaf = x.clone().requires_grad_()
    q = leaf * 1
    rotated, _ = rope(q, x.clone(), cos, sin)
    assert rotated.data_ptr() == q.data_ptr()
    dq = torch.randn_like(x)
    before = dq.clone()
    (grad,) = torch.autograd.grad(rotated, leaf, dq)
    assert torch.equal(dq, before)
    torch.testing.assert_close(grad, plain(dq, cos, -sin))


def test_wrong_arguments_are_refused() -> None:
    x, cos, sin = make((2, 5, 3, 10), torch.float32, torch.device("cpu"))
    for arguments, message in [
        ((x[0], cos, sin), r"\[B, S, H, E\]"),
        ((x[..., :9], cos, sin), "even E"),
        ((x.transpose(2, 3)[..., :2], cos, sin), "last dimension"),
        ((x, cos[:4], sin), "cos"),
        ((x, cos, sin.double()), "sin in torch.float32"),
        ((x.double(), cos, sin), "cos in torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            apply_rope_(*arguments)
