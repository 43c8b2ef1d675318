"""The gated activation of a GLU feed-forward layer, forward and backward, in place.

    product = act(gate) * up

    silu       act(g) = g * sigmoid(g)                                           (SwiGLU)
    gelu_tanh  act(g) = g * (1 + tanh(u)) / 2,  u = sqrt(2/pi) (g + 0.044715 g^3)  (GeGLU)

Since (1 + tanh(u)) / 2 = sigmoid(2u), both have the form act(g) = g * sigmoid(w(g)), and

    act'(g) = s + g s (1 - s) w'(g),  s = sigmoid(w(g))
    dgate = dproduct * up * act'(gate)
    dup   = dproduct * act(gate)

    clamped_swiglu  act(min(gate, 7)) * (1 + clip(up, -7, 7)),  act(g) = g * sigmoid(1.702 g)

is of the same form with w(g) = 1.702 g, and has no gradient where it clips (gpt-oss).

References: Shazeer, "GLU Variants Improve Transformer" (2020); OpenAI, "gpt-oss-120b & gpt-oss-20b
Model Card" (2025), section 2.2.

Legend: N tokens, F intermediate size.
"""

import torch

from mst_kernels.backend import use_triton
from mst_kernels.row_blocks import row_blocks

ACTIVATIONS = ("silu", "gelu_tanh", "clamped_swiglu")
CLAMPED = "clamped_swiglu"
SLOPE, LIMIT = 1.702, 7.0
"""Of the clamped one."""

_aten = torch.ops.aten


def glu_forward(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(gate) * up.

    gate, up: [N, F] of one dtype, with any stride between rows. out: where the result goes, [N, F];
    it may be `gate` itself, and is allocated when None. Returns out.

    Not differentiable: see `glu_backward_`. Holds no memory but out. Raises ValueError for an
    unknown activation or mismatched shapes.
    """
    _check(activation, gate, up)
    if out is None:
        out = torch.empty_like(gate)
    else:
        _check(activation, gate, out)
    if use_triton(gate):
        from mst_kernels.glu_triton import glu_forward_triton

        glu_forward_triton(gate, up, activation, out)
    elif activation == CLAMPED:
        _clamped_forward_torch(gate, up, out)
    else:
        _activate(gate, activation, out).mul_(up)
    return out


def glu_backward_(
    dproduct: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str = "silu"
) -> None:
    """The backward of `glu_forward`, in place over its three arguments, each [N, F].

    On return `gate` holds dgate, `up` holds dup, and `dproduct` holds the recomputed product
    act(gate) * up, which the weight gradient of the down projection needs.

    Memory: none with Triton; temporaries of one block of rows with torch. Raises ValueError for
    an unknown activation or mismatched shapes.
    """
    _check(activation, dproduct, gate, up)
    if use_triton(gate):
        from mst_kernels.glu_triton import glu_backward_triton_

        glu_backward_triton_(dproduct, gate, up, activation)
    elif activation == CLAMPED:
        _clamped_backward_torch(dproduct, gate, up)
    else:
        _glu_backward_torch(dproduct, gate, up, activation)


def _check(activation: str, first: torch.Tensor, *others: torch.Tensor) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}"
        )
    for tensor in (first, *others):
        if tensor.dim() != 2 or tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise ValueError(
                "a GLU's tensors must be [N, F], of one shape and dtype, but got "
                f"{list(first.shape)} {first.dtype} and {list(tensor.shape)} {tensor.dtype}"
            )


# --- torch ---------------------------------------------------------------------------------------


def _activate(gate: torch.Tensor, activation: str, out: torch.Tensor) -> torch.Tensor:
    if activation == "silu":
        _aten.silu.out(gate, out=out)
    elif activation == "gelu_tanh":
        _aten.gelu.out(gate, approximate="tanh", out=out)
    return out


def _activation_backward(
    grad: torch.Tensor, gate: torch.Tensor, activation: str, out: torch.Tensor
) -> None:
    if activation == "silu":
        _aten.silu_backward.grad_input(grad, gate, grad_input=out)
    elif activation == "gelu_tanh":
        _aten.gelu_backward.grad_input(grad, gate, approximate="tanh", grad_input=out)


def _glu_backward_torch(
    dproduct: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> None:
    for rows in row_blocks(gate, *gate.shape):
        dproduct_block, gate_block, up_block = dproduct[rows], gate[rows], up[rows]
        activated = _activate(gate_block, activation, torch.empty_like(gate_block))
        dactivated = dproduct_block * up_block
        _activation_backward(dactivated, gate_block, activation, out=gate_block)
        torch.mul(activated, up_block, out=dactivated)  # the product, in a buffer that is free now
        torch.mul(dproduct_block, activated, out=up_block)
        dproduct_block.copy_(dactivated)


def _clamped(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """sigmoid(w(g)), g * sigmoid(w(g)), and what up becomes."""
    clipped = gate.clamp(max=LIMIT)
    sigmoid = torch.sigmoid(SLOPE * clipped)
    return sigmoid, clipped.mul_(sigmoid), up.clamp(-LIMIT, LIMIT).add_(1)


def _clamped_forward_torch(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    for rows in row_blocks(gate, *gate.shape):
        _, activated, factor = _clamped(gate[rows], up[rows])
        torch.mul(activated, factor, out=out[rows])


def _clamped_backward_torch(dproduct: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> None:
    for rows in row_blocks(gate, *gate.shape):
        dproduct_block, gate_block, up_block = dproduct[rows], gate[rows], up[rows]
        sigmoid, activated, factor = _clamped(gate_block, up_block)
        slope = (1 - sigmoid).mul_(activated).mul_(SLOPE).add_(sigmoid)
        slope.mul_(factor).mul_(dproduct_block).masked_fill_(gate_block > LIMIT, 0)
        gate_block.copy_(slope)
        beyond = up_block.abs() > LIMIT
        torch.mul(dproduct_block, activated, out=up_block).masked_fill_(beyond, 0)
        torch.mul(activated, factor, out=dproduct_block)
