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
    D,
    epsilon,
    RESIDUAL: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    dtype = x_ptr.dtype.element_ty
    if RESIDUAL:
        x += tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0).to(
            tl.float32
        )
        total = x.to(dtype)
        tl.store(total_ptr + row * total_stride + columns, total, mask=mask)
        x = total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / D + epsilon)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    xhat = x * rstd
    if OFFSET:
        weight += 1.0
    else:
        xhat = xhat.to(dtype).to(tl.float32)
    tl.store(
        y_ptr + row * y_stride + columns,
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
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if OFFSET:
        weight += 1.0
    dweight = tl.zeros([BLOCK_D], dtype=tl.float32)
    first = program * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, N)):
        x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        xhat = x * rstd
        if OFFSET:
            dweight += dy * xhat
        else:
            dweight += dy * xhat.to(x_ptr.dtype.element_ty).to(tl.float32)
        g = dy * weight
        dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=0) / D))
        if DTOTAL:
            dx += tl.load(dtotal_ptr + row * dtotal_stride + columns, mask=mask, other=0.0).to(
                tl.float32
            )
        tl.store(dx_ptr + row * dx_stride + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + program * D + columns, dweight, mask=mask)


def _row_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _warps(block_d: int) -> int:
    return min(16, max(1, block_d // 512))


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
    block_d = triton.next_power_of_2(D)
    with on_device(x_ND):
        _forward_kernel[(N,)](
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
            D,
            epsilon,
            RESIDUAL=residual_ND is not None,
            OFFSET=offset,
            BLOCK_D=block_d,
            num_warps=_warps(block_d),
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
    rows_per_program = triton.cdiv(N, processors * _PROGRAMS_PER_PROCESSOR)
    programs = triton.cdiv(N, rows_per_program)
    partial_PD = torch.empty(programs, D, dtype=torch.float32, device=x_ND.device)
    block_d = triton.next_power_of_2(D)
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
            BLOCK_D=block_d,
            num_warps=_warps(block_d),
        )
    return partial_PD.sum(0)
