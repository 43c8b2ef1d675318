"""The gated activation against plain autograd."""

import pytest
import torch
import torch.nn.functional as F
from kernel_truth import assert_exact, assert_no_worse

from mst_kernels import glu_backward_, glu_forward, row_blocks
from mst_kernels.glu import ACTIVATIONS

# exp(-w) is inf in fp32 far in the negative tail, where 1 / (1 + inf) = 0 is right.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

SHAPES = [(5, 123), (123, 5), (1, 1), (3, 2500)]
NAMES = ("dgate", "dup", "product")


def plain(
    activation: str, dproduct: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """(dgate, dup, product) from torch's own operations, in the tensors' dtype."""
    gate, up = (t.detach().clone().requires_grad_() for t in (gate, up))
    if activation == "clamped_swiglu":
        product = gate.clamp(max=7) * (1.702 * gate.clamp(max=7)).sigmoid() * (up.clamp(-7, 7) + 1)
    else:
        activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        product = activated * up
    return *torch.autograd.grad(product, (gate, up), dproduct), product.detach()


def make(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """dproduct, gate and up, reaching far into the activation's two tails, and where it clips."""
    return [scale * torch.randn(shape, dtype=dtype, device=device) for scale in (1, 4, 4)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("block_elements", [1, 300, 1 << 20])
def test_float64_is_exact(activation, block_elements, monkeypatch) -> None:
    monkeypatch.setattr(row_blocks, "_CPU_BLOCK_ELEMENTS", block_elements)
    dproduct, gate, up = make((7, 123), torch.float64, torch.device("cpu"))
    dgate, dup, product = plain(activation, dproduct, gate, up)
    assert_exact("product", glu_forward(gate, up, activation), product)
    glu_backward_(dproduct, gate, up, activation)
    for name, actual, truth in zip(NAMES, (gate, up, dproduct), (dgate, dup, product), strict=True):
        assert_exact(name, actual, truth)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_plain(implementation, device, activation, dtype, shape) -> None:
    tensors = make(shape, dtype, device)
    in_dtype = plain(activation, *tensors)
    truths = plain(activation, *(t.double() for t in tensors))
    dproduct, gate, up = tensors
    assert_no_worse("product", glu_forward(gate, up, activation), in_dtype[2], truths[2])
    glu_backward_(dproduct, gate, up, activation)
    for name, *triple in zip(NAMES, (gate, up, dproduct), in_dtype, truths, strict=True):
        assert_no_worse(name, *triple)


def test_halves_of_one_projection(implementation, device) -> None:
    """gate and up may be the two halves of a fused projection's output: rows with a stride."""
    dproduct, gate, up = make((5, 123), torch.float32, device)
    fused = torch.cat([gate, up], dim=1)
    gate_half, up_half = fused[:, :123], fused[:, 123:]
    product = glu_forward(gate_half, up_half)
    torch.testing.assert_close(product, F.silu(gate) * up)
    dgate, dup, _ = plain("silu", dproduct, gate, up)
    glu_backward_(dproduct, gate_half, up_half)
    torch.testing.assert_close(fused, torch.cat([dgate, dup], dim=1))
    torch.testing.assert_close(dproduct, product)


def test_forward_over_the_gate(implementation, device) -> None:
    _, gate, up = make((5, 123), torch.float32, device)
    expected = F.silu(gate) * up
    assert glu_forward(gate, up, out=gate) is gate
    torch.testing.assert_close(gate, expected)


def test_no_rows(implementation, device) -> None:
    dproduct, gate, up = make((0, 8), torch.float32, device)
    assert glu_forward(gate, up).shape == (0, 8)
    glu_backward_(dproduct, gate, up)


def test_wrong_arguments_are_refused() -> None:
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"'relu'.*silu, gelu_tanh"):
        glu_forward(ones, ones, "relu")
    with pytest.raises(ValueError, match="one shape and dtype"):
        glu_forward(ones, torch.ones(2, 4))
    with pytest.raises(ValueError, match="one shape and dtype"):
        glu_backward_(ones, ones.clone(), ones.double())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_past_2_to_the_31_elements() -> None:
    rows, columns = 150_000, 14_336
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free device memory")
    gate, up, dproduct = (
        torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda") for _ in range(3)
    )
    last = slice(rows - 2, rows)
    kept = [t[last].clone() for t in (dproduct, gate, up)]
    glu_backward_(dproduct, gate, up)
    actual = [t[last] for t in (gate, up, dproduct)]
    truths = plain("silu", *(t.double() for t in kept))
    for name, *triple in zip(NAMES, actual, plain("silu", *kept), truths, strict=True):
        assert_no_worse(name, *triple)
