"""Triton kernel and launcher of `mst_kernels.rope`, which has the formulas.

Imported when a kernel is first used, so that nothing else needs triton.
Legend: B batch, S sequence, H heads, E head size.
"""

# Of a kernel's parameters only the constexpr are annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl

from mst_kernels.backend import on_device

_MAX_TILE = 2048  # elements of x1 in a program


@triton.jit
def _rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    x_stride_b,
    x_stride_s,
    x_stride_h,
    cos_stride_b,
    cos_stride_s,
    sin_stride_b,
    sin_stride_s,
    S,
    H,
    HALF,
    INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    token = tl.program_id(0)
    b = (token // S).to(tl.int64)
    s = (token % S).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = tl.arange(0, BLOCK_E)
    in_half = columns < HALF
    cosine = tl.load(
        cos_ptr + b * cos_stride_b + s * cos_stride_s + columns, mask=in_half, other=0.0
    )[None, :]
    sine = tl.load(
        sin_ptr + b * sin_stride_b + s * sin_stride_s + columns, mask=in_half, other=0.0
    )[None, :]
    if INVERSE:
        sine = -sine

    mask = (heads < H)[:, None] & in_half[None, :]
    x1_ptrs = (
        x_ptr
        + b * x_stride_b
        + s * x_stride_s
        + heads.to(tl.int64)[:, None] * x_stride_h
        + columns[None, :]
    )
    x2_ptrs = x1_ptrs + HALF
    x1 = tl.load(x1_ptrs, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x2_ptrs, mask=mask, other=0.0).to(tl.float32)
    dtype = x_ptr.dtype.element_ty
    tl.store(x1_ptrs, (x1 * cosine - x2 * sine).to(dtype), mask=mask)
    tl.store(x2_ptrs, (x2 * cosine + x1 * sine).to(dtype), mask=mask)


def apply_rope_triton_(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> None:
    B, S, H, E = x.shape
    if x.numel() == 0:
        return
    # A table without a batch dimension is one whose batch stride is 0.
    cos_BSE, sin_BSE = (
        (table if table.stride(-1) == 1 else table.contiguous()).expand(B, S, E // 2)
        for table in (cos, sin)
    )
    block_e = triton.next_power_of_2(E // 2)
    block_h = min(triton.next_power_of_2(H), max(1, _MAX_TILE // block_e))
    with on_device(x):
        _rope_kernel[(B * S, triton.cdiv(H, block_h))](
            x,
            cos_BSE,
            sin_BSE,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            cos_BSE.stride(0),
            cos_BSE.stride(1),
            sin_BSE.stride(0),
            sin_BSE.stride(1),
            S,
            H,
            E // 2,
            INVERSE=inverse,
            BLOCK_H=block_h,
            BLOCK_E=block_e,
            num_warps=4,
        )
