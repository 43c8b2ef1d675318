"""Causal attention over a shared sequence, a group of heads at a time.

    q, k, v   [B, L, heads, E]        -> [B, N, some heads, E]    exchange of heads
    k, v      of a node's positions   -> those that they see      exchange of keys
    out       [B, N, some heads, E]   -> [B, L, heads, E]         heads, turned round

Both exchanges are linear maps, and the backward goes through their transposes. While a group is
computed, the next one's tensors are on their way.

Legend: B batch, S sequence, L positions of a process, N positions of a node, H query heads, K
key-value heads, E head size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mst_train.mst.accumulate import wide_zeros
from mst_train.mst.attention import AttentionKernel, Documents
from mst_train.mst.attention_chunk import attend_chunk, attend_chunk_backward
from mst_train.mst.autocast import Autocast
from mst_train.mst.autograd import first_order_only
from mst_train.mst.sharing.heads import Heads, Share, start_to_heads, start_to_positions
from mst_train.mst.sharing.keys import KeyMap, Pair
from mst_train.mst.sharing.sequence import SharedSequence
from mst_train.mst.sinks import sinks_gradient


def attend_shared(
    kernel: AttentionKernel,
    sharing: SharedSequence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention by ``kernel`` over a shared sequence, differentiable in q, k, v and sinks.

    All processes call this together, and run its backward together.

    Args:
        q: [B, L, H, E]; k, v: [B, L, K, E], H a multiple of K: at this process's positions.
        documents: of the whole sequences; confines attention to each.
        sinks: [H], of all heads (mst/sinks.py); None: there are none. As of any weight that the
            processes have alike, its gradient is the sum of theirs.

    Returns:
        [B, L, H, E].

    Memory: saves q, k, v, and the result and log-sum-exp of as many queries.

    Raises ValueError where the heads cannot be shared as ``sharing`` says.
    """
    autocast = Autocast.here(q.device)
    q, k, v = map(autocast.cast, (q, k, v))
    attention = SharedAttention.of(kernel, sharing, documents, q, k)
    with autocast.off():
        out: Tensor = _Attend.apply(q, k, v, sinks, attention)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        attention: "SharedAttention",
    ) -> Tensor:
        out, kept = attention.forward(q, k, v, sinks=sinks)
        ctx.save_for_backward(q, k, v, sinks, *kept)
        ctx.attention = attention
        return out

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, *kept = ctx.saved_tensors
        gradients, dsinks = ctx.attention.backward(
            [dout, q, k, v], kept, sinks=sinks, overwrite=False
        )
        return *gradients, None if dsinks is None else dsinks.to(sinks.dtype), None


class _Opened(NamedTuple):
    """A group of heads, ready to be attended with.

    rows: in the backward the result's gradient; queries: [B, N, heads, E] each. spans: of each
    span of keys (``KeyMap``), keys and values. own: keys and values at the node's positions.
    """

    rows: Sequence[Tensor]
    spans: list[Pair]
    own: Pair


@dataclass(frozen=True)
class SharedAttention:
    """Attention of one layer over a shared sequence.

    length: of whole sequences. heads: of the model.
    """

    kernel: AttentionKernel
    sharing: SharedSequence
    documents: Documents | None
    length: int
    heads: Heads

    @classmethod
    def of(
        cls,
        kernel: AttentionKernel,
        sharing: SharedSequence,
        documents: Documents | None,
        q: Tensor,
        k: Tensor,
    ) -> "SharedAttention":
        """For tensors such as these queries and keys."""
        places = sharing.places
        heads = Heads(q.shape[2], k.shape[2], places.heads)
        return cls(kernel, sharing, documents, q.shape[1] * places.processes, heads)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Attention of this process's positions.

        Args:
            q: [B, L, H, E]; k, v: [B, L, K, E]; sinks: [H].

        Returns:
            [B, L, H, E], and what else the backward wants: for each group of heads the result and
            the log-sum-exp, [B, N, heads, E] and [B, heads, N].
        """
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        kept: list[Tensor] = []
        closing = _nothing
        for group, opened in self._opened([q, k, v], rows=1):
            result, lse = self._attend(opened, None if sinks is None else sinks[self._own(group)])
            del opened
            closing()
            closing = self._to_positions(group, [result], [], [out])
            kept += result, lse
        closing()
        return out, kept

    def result(self, kept: Sequence[Tensor]) -> Tensor:
        """What ``forward`` gave, from what it gave for the backward."""
        batch, node_length, _, size = kept[0].shape
        length = node_length // self.sharing.places.heads
        out = kept[0].new_empty(batch, length, self.heads.queries, size)
        for group, result in zip(self._groups, kept[::2], strict=True):
            self._to_positions(group, [result], [], [out])()
        return out

    def backward(
        self,
        given: list[Tensor],
        kept: list[Tensor],
        *,
        sinks: Tensor | None = None,
        overwrite: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """The gradients of q, k and v, and of the sinks: this process's part of them, in fp32 at
        least, which is zero for all heads but those that it attends with.

        Args:
            given: the result's gradient, [B, L, H, E], and q, k and v as ``forward`` took them;
                emptied as soon as other processes have their heads.
            kept: as ``forward`` gave it; emptied.
            sinks: as ``forward`` took them.
            overwrite: whether gradients may be written where q, k and v are, each group's after all
                of its were read.

        Memory: where all heads are exchanged at once, a process's positions of them are not there
        while it attends.
        """
        overwrite &= len(self._groups) > 1 or self.sharing.places.heads == 1
        shapes = [t.shape for t in given[1:]]
        into = given[1:] if overwrite else []
        dsinks = None if sinks is None else wide_zeros(sinks)
        closing = _nothing
        for group, opened in self._opened(given, rows=2):
            result, lse = kept.pop(0), kept.pop(0)
            if sinks is not None and dsinks is not None:
                own = self._own(group)
                dsinks[own] = sinks_gradient(sinks[own], opened.rows[0], result, lse)
            dq, dk, dv = self._attend_backward(opened, result, lse)
            del opened, result, lse
            closing()
            into = into or [dq.new_empty(shape) for shape in shapes]
            closing = self._to_positions(group, [dq], [dk, dv], into)
            del dq, dk, dv
        closing()
        return into, dsinks

    def _opened(self, given: list[Tensor], rows: int) -> Iterator[tuple[Sequence[Share], _Opened]]:
        """Each group of heads; the next one's tensors are on their way.

        given: so many that queries have rows in, keys and values; emptied when the last are sent.
        """
        following = [*self._groups[1:], None]
        pending = self._open(self._groups[0], given[:rows], given[rows:])
        for group, after in zip(self._groups, following, strict=True):
            opened = [pending()]
            if after is None:
                pending = _nothing
                given.clear()
            else:
                pending = self._open(after, given[:rows], given[rows:])
            yield group, opened.pop()  # which then is the caller's alone

    def _open(
        self, group: Sequence[Share], rows: Sequence[Tensor], keys_values: Sequence[Tensor]
    ) -> Callable[[], Any]:
        """Start a group's exchanges; returns what waits for the last of them."""
        sharing = self.sharing
        shares = _heads_of(group, rows, keys_values)
        to_heads = start_to_heads([*rows, *keys_values], shares, sharing.heads)

        def divided() -> tuple[Sequence[Tensor], Pair]:
            *own_rows, k, v = to_heads()
            return own_rows, (k, v)

        if sharing.places.keys == 1:

            def finish() -> _Opened:
                own_rows, own = divided()
                return _Opened(own_rows, [own], own)

            return finish
        own_rows, own = divided()
        fetched = self._keys.start(own, sharing.keys)
        return lambda: _Opened(own_rows, fetched(), own)

    def _to_positions(
        self,
        group: Sequence[Share],
        rows: Sequence[Tensor],
        keys_values: Sequence[Tensor],
        into: Sequence[Tensor],
    ) -> Callable[[], None]:
        shares = _heads_of(group, rows, keys_values)
        return start_to_positions([*rows, *keys_values], shares, self.sharing.heads, into)

    def _own(self, group: Sequence[Share]) -> slice:
        """This process's query heads of a group, of all heads."""
        return group[self.sharing.heads.rank].queries

    def _attend(self, opened: _Opened, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """(result, log-sum-exp) of a group: [B, N, heads, E] and [B, heads, N]."""
        (q,) = opened.rows
        spans = [self._for_each_reader(pair) for pair in opened.spans]
        out = lse = None
        for rows, span, chunk, documents in self._pieces(q):
            part = attend_chunk(self.kernel, q[:, rows], *spans[span], chunk, documents, sinks)
            if part[0].shape == q.shape:
                return part
            if out is None or lse is None:
                out = torch.empty_like(q, memory_format=torch.contiguous_format)
                lse = part[1].new_empty(q.shape[0], q.shape[2], q.shape[1])
            out[:, rows], lse[:, :, rows] = part
            del part  # not to be there with the next one
        assert out is not None and lse is not None
        return out, lse

    def _attend_backward(
        self, opened: _Opened, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of a group's queries, keys and values at the node's positions."""
        dout, q = opened.rows
        spans = [self._for_each_reader(pair) for pair in opened.spans]
        opened.spans.clear()
        if self.sharing.places.keys == 1:
            ((k, v),), whole = spans, slice(0, self.length)
            dq, *more = attend_chunk_backward(
                self.kernel, dout, q, k, v, out, lse, whole, self.documents, None, None
            )
            dk, dv = self._of_all_readers((more[0], more[1]), opened.own)
            return dq, dk.to(q.dtype), dv.to(q.dtype)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        sums = [(wide_zeros(k), wide_zeros(v)) for k, v in spans]
        for rows, span, chunk, documents in self._pieces(q):
            dq[:, rows] = attend_chunk_backward(
                self.kernel,
                dout[:, rows],
                q[:, rows],
                *spans[span],
                out[:, rows],
                lse[:, :, rows],
                chunk,
                documents,
                *sums[span],
            )[0]
        del spans
        sums = [self._of_all_readers(pair, opened.own) for pair in sums]
        dk, dv = self._keys.give_back(sums, opened.own, self.sharing.keys)
        return dq, dk.to(q.dtype), dv.to(q.dtype)

    def _pieces(self, q: Tensor) -> Iterator[tuple[slice, int, slice, Documents | None]]:
        """The node's pieces: queries, number of the span that they see, place in it, documents."""
        for rows, span, chunk in self._keys.seen:
            documents, place = self.documents, self._keys.spans[span]
            if documents is not None and place != slice(0, self.length):
                documents = documents.inside(q.shape[0], self.length, place)
            yield rows, span, chunk, documents

    @cached_property
    def _groups(self) -> list[list[Share]]:
        return self.heads.groups(self.sharing.keys_at_once)

    @cached_property
    def _keys(self) -> KeyMap:
        return KeyMap(self.sharing.places, self.length, self.kernel.scores.window)

    @cached_property
    def _readers(self) -> list[int] | None:
        return self.heads.readers(self.sharing.heads.rank)

    def _for_each_reader(self, pair: Pair) -> Pair:
        """Once for each query head, where key-value heads serve unequally many."""
        if self._readers is None:
            return pair
        k, v = pair
        return k[:, :, self._readers], v[:, :, self._readers]

    def _of_all_readers(self, pair: Pair, like: Pair) -> Pair:
        """The transpose of the above, summed in fp32 at least."""
        if self._readers is None:
            return pair
        heads = like[0].shape[2]
        dk, dv = (_summed_by_head(gradient, self._readers, heads) for gradient in pair)
        return dk, dv


def _heads_of(
    group: Sequence[Share], rows: Sequence[Tensor], keys_values: Sequence[Tensor]
) -> list[list[slice]]:
    """For each process, its heads of each of these tensors."""
    return [[share.queries] * len(rows) + [share.keys] * len(keys_values) for share in group]


def _summed_by_head(gradient: Tensor, heads: list[int], count: int) -> Tensor:
    """The sum of gradients of the same of ``count`` heads."""
    batch, length, _, size = gradient.shape
    wide = torch.promote_types(gradient.dtype, torch.float32)
    total = gradient.new_zeros(batch, length, count, size, dtype=wide)
    return total.index_add_(2, torch.tensor(heads, device=gradient.device), gradient.to(wide))


def _nothing() -> None:
    """There is nothing to wait for."""
