"""Rotary position embedding, in place.

The last dimension of x is two halves, x1 and x2 (the "rotate_half" convention of Hugging Face's
models), each turned by the angle whose cosine c and sine s the caller gives:

    y1 = x1 c - x2 s
    y2 = x2 c + x1 s

The inverse has -s for s. A rotation's transpose is its inverse, so the backward is the inverse of
the gradient and needs nothing from the forward but the table.

Reference: Su et al., "RoFormer" (2021), section 3.

Legend: B batch, S sequence, H heads, E head size.
"""

# mypy: allow-untyped-decorators, allow-untyped-calls

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mst_kernels.backend import use_triton
from mst_kernels.row_blocks import row_blocks


def apply_rope_(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool = False
) -> torch.Tensor:
    """Rotate x in place, and return it; with inverse=True rotate it back. Not differentiable.

    x: [B, S, H, E], E even, any strides with the last dimension contiguous. cos, sin: [S, E/2] or
    [B, S, E/2] in fp32 (fp64 for fp64 x). Computed in their dtype and rounded to x's once.

    Memory: none with Triton; with torch, temporaries of one block of positions. Raises ValueError
    for wrong shapes or dtypes.
    """
    _check(x, cos, sin)
    if use_triton(x):
        from mst_kernels.rope_triton import apply_rope_triton_

        apply_rope_triton_(x, cos, sin, inverse)
    else:
        _apply_rope_torch_(x, cos, sin, inverse)
    return x


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q [B, S, H, E] and k [B, S, K, E] in place, with gradients: see `apply_rope_`.

    Use the tensors returned: they have q's and k's memory, and q and k themselves are spent. They
    must not be leaves that need a gradient.

    Memory: the table is kept for the backward, which holds a fresh copy of each gradient.
    """
    return _Rope.apply(q, cos, sin), _Rope.apply(k, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BSHE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        # Not marked as changed in place: x is usually a projection's result seen as heads, and for
        # views autograd would copy the whole gradient once more. The version still tells anyone who
        # saved x.
        return apply_rope_(x_BSHE.detach(), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHE: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # A copy, because autograd may hand the same gradient to another consumer of the output.
        # It is contiguous, as the projection before the rotation wants it.
        turned = grad_BSHE.clone(memory_format=torch.contiguous_format)
        cos, sin = ctx.saved_tensors
        return apply_rope_(turned, cos, sin, inverse=True), None, None


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"rope needs x [B, S, H, E] with even E, but got {list(x.shape)}")
    if x.stride(-1) != 1:
        raise ValueError("rope needs x contiguous in its last dimension")
    B, S, _, E = x.shape
    expected = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape not in ((S, E // 2), (B, S, E // 2)):
            raise ValueError(
                f"rope needs {name} {[S, E // 2]} or {[B, S, E // 2]} for x {list(x.shape)}, "
                f"but got {list(table.shape)}"
            )
        if table.dtype != expected:
            raise ValueError(f"rope needs {name} in {expected} for x in {x.dtype}")


# --- torch ---------------------------------------------------------------------------------------


def _apply_rope_torch_(
    x_BSHE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> None:
    B, S, H, E = x_BSHE.shape
    for positions in row_blocks(x_BSHE, S, B * H * E):
        c = cos[..., positions, None, :]  # [(B,) S, 1, E/2]
        s = sin[..., positions, None, :]
        if inverse:
            s = -s
        x1, x2 = x_BSHE[:, positions].split(E // 2, dim=-1)
        y1 = (x1 * c).sub_(x2 * s)  # in the table's dtype
        y2 = (x2 * c).add_(x1 * s)
        x1.copy_(y1)
        x2.copy_(y2)
