"""RMSNorm, alone and fused with the residual addition, against plain autograd."""

import pytest
import torch
from kernel_truth import assert_exact, assert_no_worse
from torch.utils.checkpoint import checkpoint

from mst_kernels import add_rms_norm, rms_norm, row_blocks

EPSILON = 1e-5
SHAPES = [
    (5, 123),
    pytest.param((123, 5), marks=pytest.mark.slow),
    pytest.param((3, 41, 64), marks=pytest.mark.slow),
]


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As Hugging Face's LlamaRMSNorm rounds: xhat to x's dtype, then the weight."""
    wide = x if x.dtype == torch.float64 else x.float()
    xhat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    return weight * xhat.to(x.dtype)


def run(function, tensors, dy, dtotal=None) -> dict[str, torch.Tensor]:
    """Outputs and gradients of function(*tensors), by name; dtotal arrives on a second output."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, tensors, (dy, dtotal)[: len(outputs)])
    names = ("dx", "dweight") if len(outputs) == 1 else ("dx", "dresidual", "dweight")
    return {
        **dict(zip(("y", "total"), (o.detach() for o in outputs), strict=False)),
        **dict(zip(names, grads, strict=True)),
    }


def alone(x, weight):
    return rms_norm(x, weight, EPSILON)


def fused(x, residual, weight):
    return add_rms_norm(x, residual, weight, EPSILON)


def plain_fused(x, residual, weight):
    total = x + residual
    return plain(total, weight), total


def make(shape, dtype, device) -> tuple[torch.Tensor, ...]:
    """x, residual, weight, dy and dtotal."""
    x, residual, dy, dtotal = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    return x, residual, torch.randn(shape[-1], dtype=dtype, device=device), dy, dtotal


@pytest.mark.parametrize("block_elements", [1, 300, 1 << 20])
def test_float64_is_exact(block_elements, monkeypatch) -> None:
    monkeypatch.setattr(row_blocks, "_CPU_BLOCK_ELEMENTS", block_elements)
    x, residual, weight, dy, dtotal = make((2, 5, 123), torch.float64, torch.device("cpu"))
    truths = run(plain, (x, weight), dy)
    for name, actual in run(alone, (x, weight), dy).items():
        assert_exact(name, actual, truths[name])
    truths = run(plain_fused, (x, residual, weight), dy, dtotal)
    for name, actual in run(fused, (x, residual, weight), dy, dtotal).items():
        assert_exact(name, actual, truths[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (2, 5000)])
def test_no_worse_than_plain(implementation, device, dtype, shape) -> None:
    x, residual, weight, dy, dtotal = make(shape, dtype, device)
    for kernel, reference, tensors in [
        (alone, plain, (x, weight)),
        (fused, plain_fused, (x, residual, weight)),
    ]:
        actual = run(kernel, tensors, dy, dtotal)
        in_dtype = run(reference, tensors, dy, dtotal)
        truths = run(reference, [t.double() for t in tensors], dy.double(), dtotal.double())
        for name, truth in truths.items():
            assert_no_worse(f"{kernel.__name__} {name}", actual[name], in_dtype[name], truth)


def test_rounds_where_hugging_face_does(implementation, device) -> None:
    x, _, weight, _, _ = make((41, 123), torch.bfloat16, device)
    y, expected = rms_norm(x, weight, EPSILON), plain(x, weight)
    # One bf16 step apart is a different order of the fp32 sum, and rare.
    assert (y != expected).float().mean() < 0.01
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=0)
    assert rms_norm(x, weight.float(), EPSILON).dtype == torch.float32


def test_gradcheck() -> None:
    x, residual, weight, _, _ = (
        t.requires_grad_() for t in make((3, 7), torch.float64, torch.device("cpu"))
    )
    assert torch.autograd.gradcheck(alone, (x, weight))
    assert torch.autograd.gradcheck(fused, (x, residual, weight))


@pytest.mark.parametrize("used", [0, 1], ids=["only y", "only the sum"])
def test_one_of_the_two_outputs_unused(implementation, device, used) -> None:
    x, residual, weight, dy, _ = make((5, 123), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]
    grads, expected = (
        torch.autograd.grad(function(*leaves)[used], leaves, dy, allow_unused=True)
        for function in (fused, plain_fused)
    )
    for actual, truth in zip(grads, expected, strict=True):
        assert (actual is None) == (truth is None)
        if truth is not None:
            torch.testing.assert_close(actual, truth)


def test_the_two_gradients_share_no_memory(implementation, device) -> None:
    x, residual, weight, dy, dtotal = make((5, 123), torch.float32, device)
    x.requires_grad_(), residual.requires_grad_()
    torch.autograd.backward(fused(x, residual, weight), (dy, dtotal))
    assert x.grad is not None and residual.grad is not None
    assert torch.equal(x.grad, residual.grad)
    assert x.grad.data_ptr() != residual.grad.data_ptr()


def test_strided_input_and_gradient(implementation, device) -> None:
    x, _, weight, dy, _ = make((2, 5, 123), torch.float32, device)
    wide = torch.cat([x, x], dim=-1)[..., :123]
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    expected = run(plain, (x, weight), dy)
    for variant in (wide, turned):
        leaf = variant.detach().requires_grad_()
        y = rms_norm(leaf, weight, EPSILON)
        torch.testing.assert_close(y, expected["y"])
        strided_dy = dy.transpose(0, 1).contiguous().transpose(0, 1)
        (dx,) = torch.autograd.grad(y, leaf, strided_dy)
        torch.testing.assert_close(dx, expected["dx"])


def test_checkpoint_and_no_grad(implementation, device) -> None:
    x, residual, weight, dy, dtotal = make((5, 123), torch.float32, device)
    kept = run(fused, (x, residual, weight), dy, dtotal)
    again = run(
        lambda *tensors: checkpoint(fused, *tensors, use_reentrant=False),
        (x, residual, weight),
        dy,
        dtotal,
    )
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    with torch.no_grad():
        y, total = fused(x.requires_grad_(), residual, weight)
    assert torch.equal(y, kept["y"]) and not y.requires_grad and not total.requires_grad


def test_forward_saves_its_input_and_one_number_per_row(device) -> None:
    x, residual, weight, _, _ = make((5, 128), torch.float32, device)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.numel()), t)[1], lambda t: t
    ):
        fused(x.requires_grad_(), residual, weight)
    assert sorted(saved) == [5, 128, 5 * 128]


def test_no_rows(implementation, device) -> None:
    x, residual, weight, dy, dtotal = make((0, 8), torch.float32, device)
    results = run(fused, (x, residual, weight), dy, dtotal)
    assert results["dx"].shape == (0, 8)
    assert torch.equal(results["dweight"], torch.zeros_like(weight))


def test_wrong_shapes_are_refused() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"weight \[D\]"):
        rms_norm(x, torch.ones(4), EPSILON)
    with pytest.raises(ValueError, match="residual like x"):
        add_rms_norm(x, torch.ones(3), torch.ones(3), EPSILON)


# --- with an offset ------------------------------------------------------------------------------


def plain_offset(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As Hugging Face's Gemma2RMSNorm rounds: once, after the weight."""
    wide = x if x.dtype == torch.float64 else x.float()
    xhat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    return (xhat * (1.0 + weight.to(wide.dtype))).to(x.dtype)


def offset_alone(x, weight):
    return rms_norm(x, weight, EPSILON, offset=True)


def offset_fused(x, residual, weight):
    return add_rms_norm(x, residual, weight, EPSILON, offset=True)


def plain_offset_fused(x, residual, weight):
    total = x + residual
    return plain_offset(total, weight), total


def test_offset_in_float64_is_exact() -> None:
    x, residual, weight, dy, dtotal = make((2, 5, 123), torch.float64, torch.device("cpu"))
    truths = run(plain_offset, (x, weight), dy)
    for name, actual in run(offset_alone, (x, weight), dy).items():
        assert_exact(name, actual, truths[name])
    truths = run(plain_offset_fused, (x, residual, weight), dy, dtotal)
    for name, actual in run(offset_fused, (x, residual, weight), dy, dtotal).items():
        assert_exact(name, actual, truths[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_offset_is_no_worse_than_plain(implementation, device, dtype, shape) -> None:
    x, residual, weight, dy, dtotal = make(shape, dtype, device)
    weight *= 0.1  # as Gemma's are: added to one in bf16, most of their digits were lost
    for kernel, reference, tensors in [
        (offset_alone, plain_offset, (x, weight)),
        (offset_fused, plain_offset_fused, (x, residual, weight)),
    ]:
        actual = run(kernel, tensors, dy, dtotal)
        in_dtype = run(reference, tensors, dy, dtotal)
        truths = run(reference, [t.double() for t in tensors], dy.double(), dtotal.double())
        for name, truth in truths.items():
            assert_no_worse(f"{kernel.__name__} {name}", actual[name], in_dtype[name], truth)


def test_offset_rounds_where_hugging_face_does(implementation, device) -> None:
    x, _, weight, _, _ = make((41, 123), torch.bfloat16, device)
    y, expected = offset_alone(x, weight), plain_offset(x, weight)
    assert (y != expected).float().mean() < 0.01
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=0)
