"""Attention as one differentiable operation whose result a block can keep.

Attention's backward reads its result and the log-sum-exp of its scores. Both together are no larger
than the queries, while computing them again costs as much as the forward did: past some 53K tokens,
more than everything else in a Llama3-8B block (mst/kept.py).

Legend: B batch, S sequence, H query heads, K key-value heads, E head size.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from mst_train.mst.autocast import Autocast
from mst_train.mst.autograd import first_order_only
from mst_train.mst.kept import ATTENTION, kept_here
from mst_train.mst.sinks import join_sinks, sinks_gradient


@dataclass(frozen=True)
class Scores:
    """What attention makes of queries and keys, and which of them it makes it of.

        score = softcap * tanh(scale * q.k / softcap)

    window: keys that a query sees, its own and the ones before it; None: all before it.
    softcap: the scores' bound; None: they are scale * q.k.
    scale: None: 1 / sqrt(head size).
    sinks: whether each query head has a sink (mst/sinks.py), which joins what a kernel computed.
    """

    window: int | None = None
    softcap: float | None = None
    scale: float | None = None
    sinks: bool = field(default=False, repr=False)  # of no concern to who tells kernels apart


PLAIN = Scores()
"""Llama's: all keys before a query, scaled by 1 / sqrt(head size)."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Where packed documents begin and end: attention stays within each.

    cu_seqlens: [documents + 1] int32 on the CPU, from 0 to B*S, ascending; rows of the batch one
    after the other, so that a document may not cross from one row into the next.
    """

    cu_seqlens: Tensor

    @cached_property
    def offsets(self) -> list[int]:
        """The boundaries as numbers."""
        offsets: list[int] = self.cu_seqlens.tolist()
        return offsets

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(end - start for start, end in pairwise(self.offsets))

    def cu_seqlens_on(self, device: torch.device) -> Tensor:
        """The boundaries on a device, as variable-length kernels take them; copied once."""
        if device not in self._copies:
            self._copies[device] = self.cu_seqlens.to(device, non_blocking=True)
        return self._copies[device]

    def inside(self, batch: int, sequence: int, chunk: slice) -> "Documents":
        """The documents as this chunk of every sequence sees them, cut at its ends."""
        key = (batch, sequence, chunk.start, chunk.stop)
        if key not in self._inside:
            length = chunk.stop - chunk.start
            cu_seqlens = [0]
            for first in range(chunk.start, batch * sequence, sequence):
                begun = bisect_right(self.offsets, first)
                ended = bisect_left(self.offsets, first + length)
                done = cu_seqlens[-1]
                cu_seqlens += [done + offset - first for offset in self.offsets[begun:ended]]
                cu_seqlens.append(done + length)
            self._inside[key] = self._of(cu_seqlens)
        return self._inside[key]

    def between(self, start: int, stop: int) -> "Documents":
        """The documents of the tokens [start, stop) of the flattened batch, cut at these ends."""
        key = (start, stop)
        if key not in self._inside:
            begun, ended = bisect_right(self.offsets, start), bisect_left(self.offsets, stop)
            offsets = [0, *(offset - start for offset in self.offsets[begun:ended]), stop - start]
            self._inside[key] = self._of(offsets)
        return self._inside[key]

    def around(self, token: int) -> tuple[int, int]:
        """Where the document of a token begins and ends."""
        index = bisect_right(self.offsets, token)
        return self.offsets[index - 1], self.offsets[index]

    @staticmethod
    def _of(offsets: list[int]) -> "Documents":
        documents = Documents(torch.tensor(offsets, dtype=torch.int32))
        documents.__dict__["offsets"] = offsets  # not to be read back from the tensor
        return documents

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def _inside(self) -> dict[tuple[int, ...], "Documents"]:
        return {}


KEYS_AT_ONCE = 32768
"""``AttentionKernel.keys_at_once`` of kernels for GPUs: milliseconds of work in one call."""


class AttentionKernel(Protocol):
    """Attention's two passes.

    q, out and dout are [B, S, H, E], k and v [B, S, K, E]; lse is the log-sum-exp of each query's
    scores, [B, H, S] in fp32 at least. ``documents`` confines attention to each document; None: to
    each row of the batch. Without ``causal`` every query sees every key, of which there may then be
    another number than of queries, and there are no documents.

    A kernel with a window is asked for causal attention alone. Without documents it may be given
    more keys than queries: the queries then are those of the last keys.

    The backward must use ``out`` and ``lse`` as they are given: they may be those of the queries
    over more keys than are given here.
    """

    @property
    def scores(self) -> Scores:
        """What this kernel computes."""
        ...

    @property
    def keys_at_once(self) -> int:
        """Keys to give to one call of the backward without ``causal``, where there are more.

        A call holds the gradients of its keys and values, in some kernels once for every query
        head: this bounds them.
        """
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv), each of its input's shape."""
        ...


def attend(
    kernel: AttentionKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention by ``kernel``, differentiable in q, k, v and sinks.

    Args:
        q: [B, S, H, E]; k, v: [B, S, K, E], H a multiple of K.
        documents: confines attention to each document.
        sinks: [H], in any type (mst/sinks.py); None: there are none.

    Returns:
        [B, S, H, E].

    Memory: saves q, k, v, the result and its log-sum-exp.
    """
    autocast = Autocast.here(q.device)
    q, k, v = map(autocast.cast, (q, k, v))
    with autocast.off():
        out: Tensor = _Attend.apply(q, k, v, sinks, kernel, documents)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        kernel: AttentionKernel,
        documents: Documents | None,
    ) -> Tensor:
        kept = kept_here()
        out, lse = kept.handed(ATTENTION, 2) or join_sinks(
            *kernel.forward(q, k, v, documents), sinks
        )
        kept.record(ATTENTION, (out, lse))
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.kernel, ctx.documents = kernel, documents
        return out

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse, sinks = ctx.saved_tensors
        dsinks = None
        if sinks is not None:
            dsinks = sinks_gradient(sinks, dout, out, lse).to(sinks.dtype)
        dq, dk, dv = ctx.kernel.backward(dout, *tensors, out, lse, ctx.documents)
        return dq, dk, dv, dsinks, None, None
