"""The layouts that attention's implementations want.

Legend: B batch, S sequence, N = B*S, H heads, E head size.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mst_kernels.backend import is_fake
from mst_train.mst.attention import AttentionKernel, Documents


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """[B, S, H, E] -> [B, H, S, E], as torch's attention has it."""
    return [t.transpose(1, 2) for t in tensors]


def heads_second(tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors [B, H, S, E] -> [B, S, H, E]."""
    a, b, c = (t.transpose(1, 2) for t in tensors)
    return a, b, c


def flat(*tensors: Tensor) -> list[Tensor]:
    """[B, S, H, E] -> [N, H, E], as variable-length kernels have it."""
    return [t.flatten(0, 1) for t in tensors]


def rows_first(lse_HN: Tensor, q: Tensor) -> Tensor:
    """[H, N] -> [B, H, S], B and S as in q."""
    return lse_HN.unflatten(1, q.shape[:2]).transpose(0, 1)


def flat_heads(lse_BHS: Tensor) -> Tensor:
    """[B, H, S] -> [H, N]."""
    return lse_BHS.transpose(0, 1).flatten(1)


def each_document(documents: Documents, *tensors: Tensor) -> Iterator[tuple[slice, Any]]:
    """Each document's place in the flattened batch, and its part [1, length, H, E] of tensors."""
    # Tensors to write to are contiguous, so that this gives views of them.
    rows = [t.reshape(1, -1, *t.shape[2:]) for t in tensors]
    for start, end in pairwise(documents.offsets):
        part = slice(start, end)
        yield part, [t[:, part] for t in rows]


def forward_by_document(
    kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, documents: Documents
) -> tuple[Tensor, Tensor]:
    """The forward of a kernel that is given one document after the other."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse_HN = q.new_empty(q.shape[2], q.shape[0] * q.shape[1], dtype=lse_dtype)
    for part, (q_, k_, v_, out_) in _one_by_one(documents, q, k, v, out):
        result = kernel.forward(q_, k_, v_)
        out_.copy_(result[0])
        lse_HN[:, part] = result[1]
        del result  # not to be there with the next one
    return out, rows_first(lse_HN, q)


def backward_by_document(
    kernel: AttentionKernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Documents,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of a kernel that is given one document after the other."""
    lse_HN = flat_heads(lse)
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    for part, (dout_, q_, k_, v_, out_, *places) in _one_by_one(
        documents, dout, q, k, v, out, dq, dk, dv
    ):
        gradients = kernel.backward(dout_, q_, k_, v_, out_, lse_HN[None, :, part])
        for place, gradient in zip(places, gradients, strict=True):
            place.copy_(gradient)
        del gradient, gradients
    return dq, dk, dv


def _one_by_one(documents: Documents, *tensors: Tensor) -> Iterator[tuple[slice, Any]]:
    """Each document for those that leave nothing of one for the next; where there is no data (a
    simulated step) the longest alone, which takes the most."""
    parts = each_document(documents, *tensors)
    if not is_fake(tensors[0]):
        yield from parts
        return
    yield max(parts, key=lambda part: part[0].stop - part[0].start)
