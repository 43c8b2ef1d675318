"""The exchange of heads: DeepSpeed-Ulysses (Jacobs et al. 2023).

Key-value heads serve groups of query heads. A process attends with H/P query heads and the
key-value heads that these read; where there are fewer of them than processes, several processes get
the same one, and nobody holds a copy for each query head before the exchange.

Legend: B batch, L positions of a process, P processes that exchange heads, N = P*L positions of a
node, H query heads, K key-value heads, E head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mst_train.mst.accumulate import wide_zeros
from mst_train.mst.sharing.transport import Transport


class Share(NamedTuple):
    """Heads of one process, of all heads."""

    queries: slice
    keys: slice


@dataclass(frozen=True)
class Heads:
    """Which heads each of P processes attends with.

    Raises ValueError where the processes cannot have equally many query heads.
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

    def share(self, process: int) -> Share:
        """All heads of a process."""
        count, per_key = self.queries // self.processes, self._per_key
        queries = slice(process * count, (process + 1) * count)
        return Share(queries, slice(queries.start // per_key, (queries.stop - 1) // per_key + 1))

    def readers(self, process: int) -> list[int] | None:
        """For each query head of a process, which of its key-value heads it reads.

        None where each of these serves equally many, in order, as attention takes them.
        """
        share = self.share(process)
        found = [head // self._per_key - share.keys.start for head in _range(share.queries)]
        count = len(_range(share.keys))
        groups = [head * count // len(found) for head in range(len(found))]
        return None if len(found) % count == 0 and found == groups else found

    def groups(self, keys_at_once: int | None) -> list[list[Share]]:
        """The heads that go through attention at a time, for each process.

        At most so many key-value heads of a process and the query heads that read them; all at once
        for None, and where key-value heads serve unequally many query heads of a process.
        """
        shares = [self.share(process) for process in range(self.processes)]
        counts = {len(_range(share.keys)) for share in shares}
        if keys_at_once is None or not self._even or len(counts) > 1:
            return [shares]
        (count,) = counts
        per_key = self.queries // self.processes // count
        return [
            [
                Share(
                    _part(share.queries, first * per_key, keys_at_once * per_key),
                    _part(share.keys, first, keys_at_once),
                )
                for share in shares
            ]
            for first in range(0, count, keys_at_once)
        ]

    @cached_property
    def _even(self) -> bool:
        return all(self.readers(process) is None for process in range(self.processes))

    @property
    def _per_key(self) -> int:
        return self.queries // self.keys


def start_to_heads(
    tensors: Sequence[Tensor], shares: Sequence[Sequence[slice]], transport: Transport
) -> Callable[[], Sequence[Tensor]]:
    """Some positions of all heads -> a node's positions of some heads.

    Args:
        tensors: [B, L, heads, E] each.
        shares: for each process, the heads of each tensor that it gets.

    Returns:
        What waits for them: [B, N, its heads, E] each.
    """
    sent = [
        [tensor[:, :, heads] for tensor, heads in zip(tensors, share, strict=True)]
        for share in shares
    ]
    mine, count = sent[transport.rank], transport.processes
    if count == 1:
        return lambda: mine
    batch, length = tensors[0].shape[:2]
    whole = [t.new_empty(batch, length * count, *t.shape[2:]) for t in mine]
    wait = transport.start(sent, _by_process(whole, length))

    def finish() -> Sequence[Tensor]:
        wait()
        return whole

    return finish


def start_to_positions(
    tensors: Sequence[Tensor],
    shares: Sequence[Sequence[slice]],
    transport: Transport,
    into: Sequence[Tensor],
) -> Callable[[], None]:
    """A node's positions of some heads -> some positions of all heads; the transpose of the above.

    Args:
        tensors: [B, N, its heads, E] each.
        shares: for each process, the heads of each tensor that it has. What several have is summed,
            in fp32 at least.
        into: [B, L, heads, E] each, where they are written.

    Returns:
        What waits until they are there.
    """
    places = [
        [place[:, :, heads] for place, heads in zip(into, share, strict=True)] for share in shares
    ]
    if transport.processes == 1:
        for place, tensor in zip(places[0], tensors, strict=True):
            place.copy_(tensor)
        return lambda: None
    overlapping = [_overlap(heads) for heads in zip(*shares, strict=True)]
    for process, share in enumerate(places):
        for index, place in enumerate(share):
            if overlapping[index]:
                places[process][index] = torch.empty_like(
                    place, memory_format=torch.contiguous_format
                )
    wait = transport.start(_by_process(tensors, into[0].shape[1]), places)

    def finish() -> None:
        wait()
        for index, place in enumerate(into):
            if overlapping[index]:
                heads = [share[index] for share in shares]
                _sum_into(place, heads, [parts[index] for parts in places])

    return finish


def _by_process(tensors: Sequence[Tensor], length: int) -> list[list[Tensor]]:
    """Each process's positions of tensors [B, N, heads, E]."""
    return [list(parts) for parts in zip(*(t.split(length, dim=1) for t in tensors), strict=True)]


def _overlap(parts: Sequence[slice]) -> bool:
    every = [head for part in parts for head in _range(part)]
    return len(set(every)) < len(every)


def _sum_into(place: Tensor, heads: Sequence[slice], parts: Sequence[Tensor]) -> None:
    """Sums of heads, in fp32 at least."""
    total = wide_zeros(place)
    for its, part in zip(heads, parts, strict=True):
        total[:, :, its] += part
    place.copy_(total)


def _range(part: slice) -> range:
    return range(part.start, part.stop)


def _part(whole: slice, first: int, count: int) -> slice:
    """At most ``count`` of a slice from its ``first`` on."""
    start = whole.start + first
    return slice(start, min(start + count, whole.stop))
