"""RMSNorm, alone or fused with the residual addition before it.

For each row x of D values, with rounding to x's dtype where [...] stands:

    rstd = 1 / sqrt(mean(x^2) + epsilon)
    xhat = x rstd
    y    = weight [xhat]

which rounds where Hugging Face's LlamaRMSNorm does. With g = dy weight, the backward is

    dx      = rstd (g - xhat mean(g xhat))  (+ the gradient arriving on the sum, where fused)
    dweight = sum over rows of dy [xhat]

With ``offset`` the weight is 1 + weight, and xhat is not rounded before the product: Gemma's norm,
rounding where Hugging Face's Gemma2RMSNorm does.

Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).

Legend: N rows, D hidden size.
"""

# mypy: allow-untyped-decorators, allow-untyped-calls

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mst_kernels.backend import use_triton
from mst_kernels.row_blocks import row_blocks


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, offset: bool = False
) -> torch.Tensor:
    """RMSNorm over the last dimension, differentiable in x and weight (once).

    x: [..., D]. weight: [D]. Returns [..., D] in the dtype that x and weight promote to. Statistics
    and dweight's sum are fp32 (fp64 for fp64 x).

    Memory: the backward is left x, weight and one fp32 number per row; it allocates dx. Raises
    ValueError for wrong shapes.
    """
    _check(x, weight)
    y: torch.Tensor = _RMSNorm.apply(x, weight, epsilon, offset)
    return y


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    *,
    offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), in one pass, differentiable in all three (once).

    x, residual: [..., D] of one dtype. weight: [D]. The sum is rounded to their dtype, and the norm
    is that of the rounded sum. The backward adds the gradient arriving on the sum in the same pass.

    Memory: as `rms_norm`, with the sum in the place of x. Raises ValueError for wrong shapes.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm needs a residual like x ({list(x.shape)} {x.dtype}), but got "
            f"{list(residual.shape)} {residual.dtype}"
        )
    y, total = _AddRMSNorm.apply(x, residual, weight, epsilon, offset)
    return y, total


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: bool
    ) -> torch.Tensor:
        y, rstd, _ = _forward(x, None, weight, epsilon, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = _backward(dy, None, x, weight, rstd, ctx.offset)
        return dx, dweight, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        offset: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, rstd, total = _forward(x, residual, weight, epsilon, offset)
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: torch.Tensor | None, dtotal: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None]:
        if dy is None:  # only the sum was used
            return dtotal, dtotal, None, None, None
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = _backward(dy, dtotal, total, weight, rstd, ctx.offset)
        return dx, dx, dweight, None, None


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:] or x.shape[-1] == 0:
        raise ValueError(
            f"RMSNorm needs x [..., D] and weight [D], but got {list(x.shape)} and "
            f"{list(weight.shape)}"
        )


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    offset: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [..., D], rstd [N, 1], and what was normalised [..., D] (x itself without a residual)."""
    D = x.shape[-1]
    x_ND = x.reshape(-1, D)
    residual_ND = None if residual is None else residual.reshape(-1, D)
    total_ND = x_ND if residual is None else torch.empty_like(x_ND)
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    rstd_N1 = x.new_empty((x_ND.shape[0], 1), dtype=statistics)
    y_ND = torch.empty_like(x_ND, dtype=torch.promote_types(x.dtype, weight.dtype))
    if use_triton(x):
        from mst_kernels.rms_norm_triton import rms_norm_forward_triton as run
    else:
        run = _forward_torch
    run(x_ND, residual_ND, weight, epsilon, offset, y_ND, rstd_N1, total_ND)
    return y_ND.view(x.shape), rstd_N1, x if residual is None else total_ND.view(x.shape)


def _backward(
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd_N1: torch.Tensor,
    offset: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx [..., D] with dtotal added in, and dweight [D]."""
    D = x.shape[-1]
    x_ND, dy_ND = x.reshape(-1, D), dy.reshape(-1, D)
    dtotal_ND = None if dtotal is None else dtotal.reshape(-1, D)
    dx_ND = torch.empty_like(x_ND)
    if use_triton(x):
        from mst_kernels.rms_norm_triton import rms_norm_backward_triton as run
    else:
        run = _backward_torch
    dweight = run(dy_ND, dtotal_ND, x_ND, weight, rstd_N1, offset, dx_ND)
    return dx_ND.view(x.shape), dweight.to(weight.dtype)


# --- torch ---------------------------------------------------------------------------------------


def _forward_torch(
    x_ND: torch.Tensor,
    residual_ND: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    offset: bool,
    y_ND: torch.Tensor,
    rstd_N1: torch.Tensor,
    total_ND: torch.Tensor,
) -> None:
    for rows in row_blocks(x_ND, *x_ND.shape):
        if residual_ND is not None:
            torch.add(x_ND[rows], residual_ND[rows], out=total_ND[rows])
        total = total_ND[rows].to(rstd_N1.dtype)
        rstd = total.square().mean(1, keepdim=True).add_(epsilon).rsqrt_()
        xhat = total * rstd
        if offset:
            y_ND[rows] = xhat.mul_(weight.to(xhat.dtype) + 1.0)
        else:
            torch.mul(xhat.to(x_ND.dtype), weight, out=y_ND[rows])
        rstd_N1[rows] = rstd


def _backward_torch(
    dy_ND: torch.Tensor,
    dtotal_ND: torch.Tensor | None,
    x_ND: torch.Tensor,
    weight: torch.Tensor,
    rstd_N1: torch.Tensor,
    offset: bool,
    dx_ND: torch.Tensor,
) -> torch.Tensor:
    dtype = rstd_N1.dtype
    factor = weight.to(dtype) + 1.0 if offset else weight
    dweight = torch.zeros(x_ND.shape[1], dtype=dtype, device=x_ND.device)
    for rows in row_blocks(x_ND, *x_ND.shape):
        rstd, dy = rstd_N1[rows], dy_ND[rows].to(dtype)
        xhat = x_ND[rows] * rstd
        dweight += (dy * (xhat if offset else xhat.to(x_ND.dtype))).sum(0)
        g = dy * factor
        dx = g.addcmul_(xhat, (g * xhat).mean(1, keepdim=True), value=-1.0).mul_(rstd)
        if dtotal_ND is not None:
            dx += dtotal_ND[rows]
        dx_ND[rows] = dx
    return dweight
