"""Sequences to batches, in an order that a run can resume at any point.

Shapes: B sequences in a batch, S sequence length in tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mst_train.data.order import pseudo_random_order
from mst_train.data.packing import PackedSequences


@dataclass(frozen=True, eq=False)
class Batch:
    tokens: Tensor
    """[B, S] int64, the model's input."""
    labels: Tensor
    """[B, S] int64, the token after each: already shifted. -100 where there is none."""
    positions: Tensor
    """[B, S] int64, for the rotary embedding."""
    boundaries: Tensor | None = None
    """[documents + 1] int32, 0 to B * S: documents in the batch's rows, one row after the other;
    None where attention takes no notice of documents."""


class Loader:
    """An endless iterator of batches, fixed by ``seed``.

    The sequences of one epoch are all there are, in an order drawn from (seed, epoch); the next
    epoch follows at once, so a batch may hold the end of one and the start of another. The n-th
    sequence that a run sees depends on n and ``seed`` alone: the state is one integer, and a run
    that goes on from it sees what it would have seen, with another batch size too.
    """

    def __init__(
        self, sequences: PackedSequences, batch_size: int, seed: int, position: int = 0
    ) -> None:
        """``position``: sequences consumed before, as ``state()`` gave it."""
        self._sequences = sequences
        self._batch_size = batch_size
        self._seed = seed
        self._position = position
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        indices = [self._index(self._position + row) for row in range(self._batch_size)]
        batch = collate(self._sequences, indices)
        self._position += self._batch_size
        return batch

    def state(self) -> int:
        """Sequences consumed so far."""
        return self._position

    def _index(self, position: int) -> int:
        """The sequence that is the run's ``position``-th."""
        epoch, place = divmod(position, len(self._sequences))
        if epoch != self._epoch:
            self._order = pseudo_random_order(len(self._sequences), self._seed, epoch)
            self._epoch = epoch
        return int(self._order[place])


def fixed_batches(sequences: PackedSequences, batch_size: int, limit: int) -> Iterator[Batch]:
    """``limit`` sequences (or all, where there are fewer), spread evenly and always the same.

    The last batch is smaller where ``batch_size`` does not divide their number.
    """
    count = min(limit, len(sequences))
    indices = [place * len(sequences) // count for place in range(count)]
    for start in range(0, count, batch_size):
        yield collate(sequences, indices[start : start + batch_size])


def collate(sequences: PackedSequences, indices: list[int]) -> Batch:
    """The sequences at ``indices`` as one batch, in that order."""
    rows = [sequences[index] for index in indices]
    length = sequences.sequence_length
    starts = [row * length + s.starts for row, s in enumerate(rows) if s.starts is not None]
    end = torch.tensor([len(rows) * length])
    return Batch(
        torch.stack([row.tokens for row in rows]),
        torch.stack([row.labels for row in rows]),
        torch.stack([row.positions for row in rows]),
        torch.cat([*starts, end]).to(torch.int32) if starts else None,
    )
