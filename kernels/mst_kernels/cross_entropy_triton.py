"""Triton kernel and launcher of `mst_kernels.cross_entropy`, which has the formulas.

Imported when a kernel is first used, so that nothing else needs triton.
Legend: N tokens, V vocabulary.
"""

# Of a kernel's parameters only the constexpr are annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl

from mst_kernels.backend import on_device

_MAX_BLOCK_V = 8192


@triton.jit
def _tanh(x):
    """tanh in fp32, as a series near zero, where (1 - e) / (1 + e) would lose digits."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    square = x * x
    series = 1.0 + square * (
        -0.3333333333333333
        + square
        * (0.13333333333333333 + square * (-0.05396825396825397 + square * 0.021869488536155203))
    )
    ratio = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0.3, x * series, tl.where(x < 0.0, -ratio, ratio))


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    target_parts_ptr,
    row_stride,
    label_stride,
    V,
    ignore_index,
    softcap,
    z_loss,
    smoothing,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    label = tl.load(labels_ptr + row * label_stride)
    columns = tl.arange(0, BLOCK_V)

    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            tl.store(target_parts_ptr + row, 0.0)
            zeros = tl.zeros([BLOCK_V], dtype=logits_ptr.dtype.element_ty)
            for start in range(0, V, BLOCK_V):
                tl.store(logits_ptr + start + columns, zeros, mask=start + columns < V)
    else:
        # Very low and not -inf, so that a block of -inf logits gives 0 and not nan.
        top = -3.0e38
        exp_sum = 0.0
        score_sum = 0.0
        for start in range(0, V, BLOCK_V):
            mask = start + columns < V
            s = tl.load(logits_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
            if SOFTCAP:
                s = softcap * _tanh(s / softcap)
            if SMOOTHING:
                score_sum += tl.sum(tl.where(mask, s, 0.0), axis=0)
            s = tl.where(mask, s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, axis=0))
            exp_sum = exp_sum * tl.exp(top - new_top) + tl.sum(tl.exp(s - new_top), axis=0)
            top = new_top
        log_sum = tl.log(exp_sum)
        lse = top + log_sum

        valid = (label >= 0) & (label < V)
        target_score = tl.load(logits_ptr + label, mask=valid, other=0.0).to(tl.float32)
        target_slope = 1.0
        if SOFTCAP:
            capped_target = _tanh(target_score / softcap)
            target_score = softcap * capped_target
            target_slope = 1.0 - capped_target * capped_target
        loss = (top - target_score) + log_sum + z_loss * lse * lse
        if SMOOTHING:
            loss += smoothing * (target_score - score_sum / V)
        tl.store(losses_ptr + row, loss)

        if GRADIENT:
            inside = tl.exp(target_score - lse) >= 0.5
            apart = tl.where(valid & (inside == 0), -(1.0 - smoothing) * target_slope, 0.0)
            tl.store(target_parts_ptr + row, apart)
            left = tl.where(inside, 1.0 - smoothing, 0.0)
            scale = 1.0 + 2.0 * z_loss * lse
            # The row's own target was read above: no thread may overwrite it before.
            tl.debug_barrier()
            for start in range(0, V, BLOCK_V):
                mask = start + columns < V
                s = tl.load(logits_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
                slope = 1.0
                if SOFTCAP:
                    capped = _tanh(s / softcap)
                    s = softcap * capped
                    slope = 1.0 - capped * capped
                d = tl.exp(s - lse) * scale
                d = tl.where(start + columns == label, d - left, d)
                d = (d - smoothing / V) * slope
                tl.store(
                    logits_ptr + start + columns,
                    d.to(logits_ptr.dtype.element_ty),
                    mask=mask,
                )


def cross_entropy_triton(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    N, V = logits.shape
    if logits.stride(1) != 1 and V > 1:
        raise ValueError("cross-entropy needs logits that are contiguous along the vocabulary")
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    target_parts = torch.empty_like(losses)
    given = target_parts if gradient else None
    if N == 0:
        return losses, given
    block = min(_MAX_BLOCK_V, triton.next_power_of_2(V))
    with on_device(logits):
        _cross_entropy_kernel[(N,)](
            logits,
            labels,
            losses,
            target_parts,
            logits.stride(0),
            labels.stride(0),
            V,
            ignore_index,
            1.0 if softcap is None else float(softcap),
            float(z_loss),
            float(label_smoothing),
            SOFTCAP=softcap is not None,
            SMOOTHING=label_smoothing != 0.0,
            GRADIENT=gradient,
            BLOCK_V=block,
            num_warps=16 if block >= 4096 else 4,
        )
    return losses, given
