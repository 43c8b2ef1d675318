"""Sequence-parallel attention: DeepSpeed-Ulysses (Jacobs et al. 2023).

Everything in a decoder but attention treats each token by itself, so P processes share a sequence
by its positions. For attention they exchange all heads at their positions for all positions of
their heads, and attention itself runs as it does in one process, on H/P query heads. Two exchanges
each way:

    q, k, v  [B, L, heads, E]   ->  [B, S, heads of this process, E]    one all-to-all for the three
    out      [B, S, H/P, E]     ->  [B, L, H, E]                        one all-to-all

Both are linear maps whose transposes are the opposite exchanges, which is what their backwards are.

Key-value heads serve groups of query heads. A process gets those that its query heads read; where
there are fewer of them than processes, several processes get the same one, and nobody holds a
copy for each query head before the exchange. In the backward, the gradients that these processes
send back are summed.

Legend: B batch, S sequence, L = S/P positions of a process, P processes that share a sequence, H
query heads, K key-value heads, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mst_train.distributed.comm_timer import WAITING
from mst_train.mst import Documents, Scores
from mst_train.mst.autograd import first_order_only


class LocalAttention(Protocol):
    """Causal attention in one process (``model.attention.Attention``)."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> Tensor: ...

    def of(self, scores: Scores) -> "LocalAttention": ...


@dataclass(frozen=True)
class UlyssesAttention:
    """Causal attention over sequences that the processes of ``group`` share.

    local: what each process runs on whole sequences of its heads.

    Called with q [B, L, H, E] and k, v [B, L, K, E], at this process's positions, and the documents
    of the whole sequences; gives [B, L, H, E]. All processes of the group call it together, and run
    its backward together.

    Memory: while an exchange runs, a buffer to send from and one to receive in. Afterwards q, k and
    v of whole sequences and this process's heads, as attention keeps them.

    Raises ValueError where the degree does not divide the query heads.
    """

    local: LocalAttention
    group: "dist.ProcessGroup"

    def of(self, scores: Scores) -> "UlyssesAttention":
        return UlyssesAttention(self.local.of(scores), self.group)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> Tensor:
        heads = Heads(q.shape[2], k.shape[2], dist.get_world_size(self.group))
        q, k, v = _ToHeads.apply(q, k, v, heads, self.group)  # type: ignore[no-untyped-call]
        readers = heads.readers(dist.get_rank(self.group))
        if readers is not None:
            k, v = k[:, :, readers], v[:, :, readers]
        out = self.local(q, k, v, documents)
        mine: Tensor = _ToPositions.apply(out, self.group)  # type: ignore[no-untyped-call]
        return mine


@dataclass(frozen=True)
class Heads:
    """Which heads each of P processes attends with: H/P query heads, and the key-value heads that
    these read.
    """

    queries: int
    keys: int
    processes: int

    def __post_init__(self) -> None:
        if self.queries % self.processes or self.queries % self.keys:
            raise ValueError(
                f"{self.queries} query heads cannot be shared by {self.processes} processes and "
                f"{self.keys} key-value heads: they must be a multiple of both"
            )

    @property
    def own_queries(self) -> int:
        """Query heads of each process."""
        return self.queries // self.processes

    def query_heads(self, process: int) -> slice:
        """A process's query heads."""
        return slice(process * self.own_queries, (process + 1) * self.own_queries)

    def key_heads(self, process: int) -> slice:
        """The key-value heads that a process's query heads read."""
        heads, per_key = self.query_heads(process), self.queries // self.keys
        return slice(heads.start // per_key, (heads.stop - 1) // per_key + 1)

    @property
    def some_keys_shared(self) -> bool:
        """Whether several processes read the same key-value head."""
        return sum(self._count(p) for p in range(self.processes)) > self.keys

    def readers(self, process: int) -> list[int] | None:
        """For each query head of a process, which of its key-value heads it reads.

        None where each of these serves equally many, in order, as attention takes them.
        """
        heads, per_key = self.query_heads(process), self.queries // self.keys
        first, count = self.key_heads(process).start, self._count(process)
        found = [head // per_key - first for head in range(heads.start, heads.stop)]
        groups = [head * count // len(found) for head in range(len(found))]
        return None if len(found) % count == 0 and found == groups else found

    def _count(self, process: int) -> int:
        (count,) = _widths([self.key_heads(process)])
        return count


class _ToHeads(torch.autograd.Function):
    """Some positions of all heads -> all positions of some heads, for q, k and v at once."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: Heads, group: "dist.ProcessGroup"
    ) -> tuple[Tensor, ...]:
        ctx.heads, ctx.group = heads, group
        own = _slices(heads, dist.get_rank(group))
        sent = [
            [tensor[:, :, part] for tensor, part in zip((q, k, v), parts, strict=True)]
            for parts in (_slices(heads, process) for process in range(heads.processes))
        ]
        received = _exchange(sent, [own] * heads.processes, q, group)
        batch, length, _, size = q.shape
        results = tuple(
            q.new_empty(batch, length * heads.processes, width, size) for width in _widths(own)
        )
        for process, part in enumerate(received):
            place = slice(process * length, (process + 1) * length)
            for result, piece in zip(results, part.split(_widths(own), dim=2), strict=True):
                result[:, place] = piece
        return results

    @staticmethod
    @first_order_only
    def backward(
        ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        heads: Heads = ctx.heads
        slices = [_slices(heads, process) for process in range(heads.processes)]
        by_process = [t.chunk(heads.processes, dim=1) for t in (dq, dk, dv)]
        sent = list(zip(*by_process, strict=True))
        received = _exchange(sent, slices, dq, ctx.group)
        batch, length, _, size = sent[0][0].shape
        # A head that several processes have read has a sum, in fp32 at least.
        dtype = dq.dtype
        if heads.some_keys_shared:
            dtype = torch.promote_types(dtype, torch.float32)
        totals = [
            dq.new_empty(batch, length, heads.queries, size),
            *(dq.new_zeros(batch, length, heads.keys, size, dtype=dtype) for _ in range(2)),
        ]
        for part, own in zip(received, slices, strict=True):
            pieces = part.split(_widths(own), dim=2)
            totals[0][:, :, own[0]] = pieces[0]
            for total, piece, place in zip(totals[1:], pieces[1:], own[1:], strict=True):
                total[:, :, place] += piece
        return totals[0], totals[1].to(dq.dtype), totals[2].to(dq.dtype), None, None


class _ToPositions(torch.autograd.Function):
    """All positions of some heads -> some positions of all heads."""

    @staticmethod
    def forward(ctx: Any, out_BShE: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ctx.group = group
        processes, own_heads = dist.get_world_size(group), slice(0, out_BShE.shape[2])
        sent = [[part] for part in out_BShE.chunk(processes, dim=1)]
        received = _exchange(sent, [(own_heads,)] * processes, out_BShE, group)
        return torch.cat(received, dim=2)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dout_BLHE: Tensor) -> tuple[Tensor, None]:
        processes = dist.get_world_size(ctx.group)
        own_heads = slice(0, dout_BLHE.shape[2] // processes)
        sent = [[heads] for heads in dout_BLHE.chunk(processes, dim=2)]
        received = _exchange(sent, [(own_heads,)] * processes, dout_BLHE, ctx.group)
        return torch.cat(received, dim=1), None


def _exchange(
    sent: Sequence[Sequence[Tensor]],
    expected: Sequence[Sequence[slice]],
    like: Tensor,
    group: "dist.ProcessGroup",
) -> list[Tensor]:
    """One all-to-all of tensors that differ in their number of heads.

    Args:
        sent: for each process, tensors [B, L, heads, E].
        expected: for each process, the heads of what it sends.
        like: for E and the type.

    Returns:
        From each process [B, L, heads, E], its tensors' heads one after the other.
    """
    batch, length, _, size = sent[0][0].shape
    outgoing = like.new_empty(sum(t.numel() for tensors in sent for t in tensors))
    outgoing_sizes, start = [], 0
    for tensors in sent:
        heads = sum(t.shape[2] for t in tensors)
        numel = batch * length * heads * size
        place = outgoing[start : start + numel].view(batch, length, heads, size)
        for tensor, part in zip(
            tensors, place.split([t.shape[2] for t in tensors], dim=2), strict=True
        ):
            part.copy_(tensor)
        outgoing_sizes.append(numel)
        start += numel
    shapes = [(batch, length, sum(_widths(parts)), size) for parts in expected]
    incoming_sizes = [batch * length * heads * size for _, _, heads, _ in shapes]
    incoming = like.new_empty(sum(incoming_sizes))
    with WAITING.measured(like.device):
        dist.all_to_all_single(incoming, outgoing, incoming_sizes, outgoing_sizes, group=group)
    return [
        part.view(shape) for part, shape in zip(incoming.split(incoming_sizes), shapes, strict=True)
    ]


def _slices(heads: Heads, process: int) -> tuple[slice, slice, slice]:
    """A process's heads of q, k and v."""
    keys = heads.key_heads(process)
    return heads.query_heads(process), keys, keys


def _widths(slices: Sequence[slice]) -> list[int]:
    return [part.stop - part.start for part in slices]
