"""Triton kernels and launchers of `mst_kernels.rms_norm`, which has the formulas.

Imported when a kernel is first used, so that nothing else needs triton.
Legend: N rows, D hidden size.
"""

# Of a kernel's parameters only the constexpr are annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl

from mst_kernels.backend import on_device

_PROGRAMS_PER_PROCESSOR = 2

_TILE = 4096
"""Numbers that a program has in hand at once: one long row, or several short ones (of a head)."""


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    total_ptr,
    x_stride,
    residual_stride,
    y_stride,
    total_stride,
    N,
    D,
    epsilon,
    RESIDUAL: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = (rows < N) & (columns < D)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    dtype = x_ptr.dtype.element_ty
    if RESIDUAL:
        x += tl.load(residual_ptr + rows * residual_stride + columns, mask=mask, other=0.0).to(
            tl.float32
        )
        total = x.to(dtype)
        tl.store(total_ptr + rows * total_stride + columns, total, mask=mask)
        x = total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + epsilon)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    xhat = x * rstd
    if OFFSET:
        weight += 1.0
    else:
        xhat = xhat.to(dtype).to(tl.float32)
    tl.store(
        y_ptr + rows * y_stride + columns,
        (xhat * weight).to(y_ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def _backward_kernel(
    dy_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    dy_stride,
    dtotal_stride,
    x_stride,
    dx_stride,
    N,
    D,
    rows_per_program,
    DTOTAL: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    if OFFSET:
        weight += 1.0
    dweight = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    first = program * rows_per_program
    for start in range(first, tl.minimum(first + rows_per_program, N), BLOCK_N):
        rows_N = start + tl.arange(0, BLOCK_N)
        rows = rows_N[:, None]
        mask = (rows < N) & (columns < D)
        x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows_N, mask=rows_N < N, other=0.0)[:, None]
        xhat = x * rstd
        if OFFSET:
            dweight += dy * xhat
        else:
            dweight += dy * xhat.to(x_ptr.dtype.element_ty).to(tl.float32)
        g = dy * weight
        dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=1, keep_dims=True) / D))
        if DTOTAL:
            dx += tl.load(dtotal_ptr + rows * dtotal_stride + columns, mask=mask, other=0.0).to(
                tl.float32
            )
        tl.store(dx_ptr + rows * dx_stride + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    dweight_sum = tl.sum(dweight, axis=0, keep_dims=True)
    tl.store(partial_ptr + program * D + columns, dweight_sum, mask=columns < D)


def _row_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _tile(D: int) -> tuple[int, dict[str, int]]:
    """Rows that a program takes at once, and all of a launch that follows from the rows' length."""
    block_d = triton.next_power_of_2(D)
    block_n = max(1, _TILE // block_d)
    warps = min(16, max(1, block_n * block_d // 512))
    return block_n, {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps}


def rms_norm_forward_triton(
    x_ND: torch.Tensor,
    residual_ND: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    offset: bool,
    y_ND: torch.Tensor,
    rstd_N1: torch.Tensor,
    total_ND: torch.Tensor,
) -> None:
    N, D = x_ND.shape
    if N == 0:
        return
    x_ND = _row_contiguous(x_ND)
    residual_or_x = x_ND if residual_ND is None else _row_contiguous(residual_ND)
    block_n, tile = _tile(D)
    with on_device(x_ND):
        _forward_kernel[(triton.cdiv(N, block_n),)](
            x_ND,
            residual_or_x,
            weight.contiguous(),
            y_ND,
            rstd_N1,
            total_ND,
            x_ND.stride(0),
            residual_or_x.stride(0),
            y_ND.stride(0),
            total_ND.stride(0),
            N,
            D,
            epsilon,
            RESIDUAL=residual_ND is not None,
            OFFSET=offset,
            **tile,
        )


def rms_norm_backward_triton(
    dy_ND: torch.Tensor,
    dtotal_ND: torch.Tensor | None,
    x_ND: torch.Tensor,
    weight: torch.Tensor,
    rstd_N1: torch.Tensor,
    offset: bool,
    dx_ND: torch.Tensor,
) -> torch.Tensor:
    N, D = x_ND.shape
    if N == 0:
        return torch.zeros(D, dtype=torch.float32, device=x_ND.device)
    x_ND, dy_ND = _row_contiguous(x_ND), _row_contiguous(dy_ND)
    dtotal_or_dy = dy_ND if dtotal_ND is None else _row_contiguous(dtotal_ND)
    # Partial sums per program and then one sum over them: the same result on every run, which
    # atomic additions would not give.
    processors = (
        torch.cuda.get_device_properties(x_ND.device).multi_processor_count if x_ND.is_cuda else 2
    )
    block_n, tile = _tile(D)
    tiles = triton.cdiv(N, block_n)
    rows_per_program = triton.cdiv(tiles, processors * _PROGRAMS_PER_PROCESSOR) * block_n
    programs = triton.cdiv(N, rows_per_program)
    partial_PD = torch.empty(programs, D, dtype=torch.float32, device=x_ND.device)
    with on_device(x_ND):
        _backward_kernel[(programs,)](
            dy_ND,
            dtotal_or_dy,
            x_ND,
            weight.contiguous(),
            rstd_N1,
            dx_ND,
            partial_PD,
            dy_ND.stride(0),
            dtotal_or_dy.stride(0),
            x_ND.stride(0),
            dx_ND.stride(0),
            N,
            D,
            rows_per_program,
            DTOTAL=dtotal_ND is not None,
            OFFSET=offset,
            **tile,
        )
    return partial_PD.sum(0)
