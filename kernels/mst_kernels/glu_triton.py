"""Triton kernels and launchers of `mst_kernels.glu`, which has the formulas.

Imported when a kernel is first used, so that nothing else needs triton.
Legend: N tokens, F intermediate size.
"""

# Of a kernel's parameters only the constexpr are annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl

from mst_kernels.backend import on_device

_BLOCK_F = 1024
_GELU = tl.constexpr(1)
_CLAMPED = tl.constexpr(2)
_KINDS = {"silu": 0, "gelu_tanh": 1, "clamped_swiglu": 2}


@triton.jit
def _gate_sigmoid(g, KIND: tl.constexpr):
    """sigmoid(w(g)) and w'(g), in fp32."""
    if KIND == _CLAMPED:
        w = 1.702 * g
        slope = tl.full(g.shape, 1.702, tl.float32)
    elif KIND == _GELU:
        # 2 sqrt(2/pi) = 1.5957691216
        w = 1.5957691216057308 * g * (1.0 + 0.044715 * g * g)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    else:
        w = g
        slope = tl.full(g.shape, 1.0, tl.float32)
    return 1.0 / (1.0 + tl.exp(-w)), slope


@triton.jit
def _glu_forward_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_stride,
    up_stride,
    out_stride,
    F,
    KIND: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = columns < F
    g = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if KIND == _CLAMPED:
        g = tl.minimum(g, 7.0)
        u = tl.minimum(tl.maximum(u, -7.0), 7.0) + 1.0
    s, _ = _gate_sigmoid(g, KIND)
    product = g * s * u
    tl.store(out_ptr + row * out_stride + columns, product.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_backward_kernel(
    dproduct_ptr,
    gate_ptr,
    up_ptr,
    dproduct_stride,
    gate_stride,
    up_stride,
    F,
    KIND: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = columns < F
    dproduct_ptrs = dproduct_ptr + row * dproduct_stride + columns
    gate_ptrs = gate_ptr + row * gate_stride + columns
    up_ptrs = up_ptr + row * up_stride + columns
    d = tl.load(dproduct_ptrs, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32)
    kept_gate, kept_up = d, d
    if KIND == _CLAMPED:  # where it clips there is no gradient
        kept_gate = tl.where(g > 7.0, 0.0, d)
        kept_up = tl.where(tl.abs(u) > 7.0, 0.0, d)
        g = tl.minimum(g, 7.0)
        u = tl.minimum(tl.maximum(u, -7.0), 7.0) + 1.0
    s, slope = _gate_sigmoid(g, KIND)
    activated = g * s
    dgate = kept_gate * u * (s + activated * (1.0 - s) * slope)
    dtype = gate_ptr.dtype.element_ty
    tl.store(gate_ptrs, dgate.to(dtype), mask=mask)
    tl.store(up_ptrs, (kept_up * activated).to(dtype), mask=mask)
    tl.store(dproduct_ptrs, (activated * u).to(dtype), mask=mask)


def _row_stride(tensor: torch.Tensor) -> int:
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        raise ValueError("a GLU's tensors must be contiguous in their last dimension")
    return tensor.stride(0)


def glu_forward_triton(
    gate: torch.Tensor, up: torch.Tensor, activation: str, out: torch.Tensor
) -> None:
    N, F = gate.shape
    if N == 0 or F == 0:
        return
    with on_device(gate):
        _glu_forward_kernel[(N, triton.cdiv(F, _BLOCK_F))](
            gate,
            up,
            out,
            _row_stride(gate),
            _row_stride(up),
            _row_stride(out),
            F,
            KIND=_KINDS[activation],
            BLOCK_F=_BLOCK_F,
            num_warps=4,
        )


def glu_backward_triton_(
    dproduct: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> None:
    N, F = gate.shape
    if N == 0 or F == 0:
        return
    with on_device(gate):
        _glu_backward_kernel[(N, triton.cdiv(F, _BLOCK_F))](
            dproduct,
            gate,
            up,
            _row_stride(dproduct),
            _row_stride(gate),
            _row_stride(up),
            F,
            KIND=_KINDS[activation],
            BLOCK_F=_BLOCK_F,
            num_warps=4,
        )
