"""Attention of a chunk of queries: some positions', over the keys up to there.

Attention kernels know squares (every query sees the keys before it) and rectangles (every query
sees every key). The queries at [s, e) see the square of the keys [s, e) and the rectangle of
the keys before s; with packed documents, of those keys the ones of the document that reaches over
s. The two results are merged by their log-sum-exps, as in FlashAttention's own loop (Dao 2023,
section 3.1); each part's backward is exact with the merged result and log-sum-exp, as in ring
attention (Liu et al. 2023).

With a sliding window there is nothing to merge: the queries see the keys of [s, e) and of one
window before s, which one call of the kernel takes. Cost and memory then do not depend on s.

Legend: B batch, S sequence, T positions of a chunk, H query heads, K key-value heads, E head size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mst_train.mst.attention import KEYS_AT_ONCE, AttentionKernel, Documents
from mst_train.mst.chunking import chunk_slices
from mst_train.mst.sinks import join_sinks


class _Part(NamedTuple):
    """Queries (counted from the chunk's first), and keys that hold all that these see."""

    batch: slice
    queries: slice
    keys: slice
    documents: Documents | None


class _Rectangle(NamedTuple):
    """Queries (counted from the chunk's first) that all see these keys."""

    batch: slice
    queries: slice
    keys: slice


def attend_chunk(
    kernel: AttentionKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: slice,
    documents: Documents | None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of a chunk's queries.

    Args:
        q: [B, T, H, E], the queries of the chunk alone.
        k, v: [B, S, K, E]; what comes after the chunk is not read.
        sinks: [H]; they join once, when all keys are there.

    Returns:
        (out, lse): [B, T, H, E] and [B, H, T].
    """
    if kernel.scores.window is not None:
        parts = _parts(documents, k, chunk, kernel.scores.window)
        return join_sinks(*_attend_window(kernel, q, k, v, parts), sinks)
    out, lse = kernel.forward(q, k[:, chunk], v[:, chunk], _inside(documents, k, chunk))
    for batch, queries, keys in _before(documents, k, chunk, KEYS_AT_ONCE):
        past_out, past_lse = kernel.forward(
            q[batch, queries], k[batch, keys], v[batch, keys], causal=False
        )
        part, part_lse = out[batch, queries], lse[batch, :, queries]
        merged_lse = torch.logaddexp(part_lse, past_lse)
        merged = part * _share(part_lse, merged_lse)
        part.copy_(merged.addcmul_(past_out, _share(past_lse, merged_lse)))
        part_lse.copy_(merged_lse)
        del past_out, past_lse, merged  # not to be there with the next ones
    return join_sinks(out, lse, sinks)


def attend_chunk_backward(
    kernel: AttentionKernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    chunk: slice,
    documents: Documents | None,
    dk: Tensor | None,
    dv: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q and of the chunk's keys and values.

    Called for the last chunk first: the keys of a chunk are seen by its queries and later ones, so
    when its turn comes, ``dk`` and ``dv`` hold all the rest of their gradients.

    Args:
        dout, out: [B, T, H, E]; lse: [B, H, T], as ``attend_chunk`` gave it.
        dk, dv: [B, S, K, E] in fp32 at least, zero before the first call; the gradients of all keys
            and values that the chunk sees are added. None where the sequence is one chunk.

    Returns:
        (dq, dk, dv) of the chunk, in the types of q, k and v.
    """
    if kernel.scores.window is not None:
        parts = _parts(documents, k, chunk, kernel.scores.window)
        return _attend_window_backward(kernel, dout, q, k, v, out, lse, chunk, parts, dk, dv)
    inside = _inside(documents, k, chunk)
    dq_T, dk_T, dv_T = kernel.backward(dout, q, k[:, chunk], v[:, chunk], out, lse, inside)
    if dk is None or dv is None:
        return dq_T, dk_T, dv_T
    total = dq_T.to(dk.dtype)
    for batch, queries, keys in _before(documents, k, chunk, kernel.keys_at_once):
        past_dq, past_dk, past_dv = kernel.backward(
            dout[batch, queries],
            q[batch, queries],
            k[batch, keys],
            v[batch, keys],
            out[batch, queries],
            lse[batch, :, queries],
            causal=False,
        )
        total[batch, queries] += past_dq
        dk[batch, keys] += past_dk
        dv[batch, keys] += past_dv
        del past_dq, past_dk, past_dv  # not to be there with the next ones
    dk[:, chunk] += dk_T
    dv[:, chunk] += dv_T
    return total.to(q.dtype), dk[:, chunk].to(k.dtype), dv[:, chunk].to(v.dtype)


def _attend_window(
    kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, parts: list[_Part]
) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        batch, queries, keys, documents = parts[0]
        return kernel.forward(q[batch, queries], k[batch, keys], v[batch, keys], documents)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_dtype)
    for batch, queries, keys, documents in parts:
        result = kernel.forward(q[batch, queries], k[batch, keys], v[batch, keys], documents)
        out[batch, queries], lse[batch, :, queries] = result
        del result  # not to be there with the next one
    return out, lse


def _attend_window_backward(
    kernel: AttentionKernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    chunk: slice,
    parts: list[_Part],
    dk: Tensor | None,
    dv: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    for batch, queries, keys, documents in parts:
        part_dq, part_dk, part_dv = kernel.backward(
            dout[batch, queries],
            q[batch, queries],
            k[batch, keys],
            v[batch, keys],
            out[batch, queries],
            lse[batch, :, queries],
            documents,
        )
        if dk is None or dv is None:  # the sequence is one chunk, and so one part
            return part_dq, part_dk, part_dv
        dq[batch, queries] = part_dq
        dk[batch, keys] += part_dk
        dv[batch, keys] += part_dv
        del part_dq, part_dk, part_dv
    assert dk is not None and dv is not None
    return dq, dk[:, chunk].to(k.dtype), dv[:, chunk].to(v.dtype)


def _parts(documents: Documents | None, k_BSKE: Tensor, chunk: slice, window: int) -> list[_Part]:
    """What the chunk's queries see through a window, in calls of a kernel."""
    batch, sequence = k_BSKE.shape[:2]
    length, oldest = chunk.stop - chunk.start, max(chunk.start - window + 1, 0)
    if documents is None or length == sequence:
        return [_Part(slice(None), slice(0, length), slice(oldest, chunk.stop), documents)]
    parts = []
    for row in range(batch):
        of_row, offset = slice(row, row + 1), row * sequence
        start, end = documents.around(offset + chunk.start)
        continued = 0  # queries of the document that reaches over the chunk's start
        if start - offset < chunk.start:
            continued = min(end - offset, chunk.stop) - chunk.start
            keys = slice(max(start - offset, oldest), chunk.start + continued)
            parts.append(_Part(of_row, slice(0, continued), keys, None))
        if continued < length:
            keys = slice(chunk.start + continued, chunk.stop)
            others = documents.between(offset + keys.start, offset + keys.stop)
            parts.append(_Part(of_row, slice(continued, length), keys, others))
    return parts


def _share(part_lse_BHT: Tensor, whole_lse_BHT: Tensor) -> Tensor:
    """What a part of the keys counts in the whole, [B, T, H, 1]."""
    return (part_lse_BHT - whole_lse_BHT).exp_().transpose(1, 2).unsqueeze(-1)


def _inside(documents: Documents | None, k_BSKE: Tensor, chunk: slice) -> Documents | None:
    """The documents as the chunk alone sees them."""
    batch, sequence = k_BSKE.shape[:2]
    if documents is None or chunk.stop - chunk.start == sequence:
        return documents
    return documents.inside(batch, sequence, chunk)


def _before(
    documents: Documents | None, k_BSKE: Tensor, chunk: slice, at_once: int
) -> Iterator[_Rectangle]:
    """What the chunk's queries see before it, at most so many keys at once."""
    batch, sequence = k_BSKE.shape[:2]
    if chunk.start == 0:
        return
    length = chunk.stop - chunk.start
    if documents is None:
        # Whole chunks of keys make few different rectangles, and some kernels plan for each.
        whole_chunks = at_once // length * length
        for keys in chunk_slices(chunk.start, whole_chunks or at_once):
            yield _Rectangle(slice(None), slice(0, length), keys)
        return
    for row in range(batch):
        first = row * sequence + chunk.start
        start, end = documents.around(first)
        if start < first:
            queries = slice(0, min(end - first, length))
            offset = start - row * sequence
            for part in chunk_slices(chunk.start - offset, at_once):
                keys = slice(offset + part.start, offset + part.stop)
                yield _Rectangle(slice(row, row + 1), queries, keys)
