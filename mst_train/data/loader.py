"""Sequences to batches, in an order that a run can resume at any point.

Shapes: B sequences in a batch, S sequence length in tokens.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mst_train.data.packing import Sequences

if TYPE_CHECKING:
    from torch import Tensor

READ_AHEAD = 2
"""Batches that are read while the one before is used."""


@dataclass(frozen=True, eq=False)
class Batch:
    tokens: "Tensor"
    """[B, S] int64, the model's input."""
    labels: "Tensor"
    """[B, S] int64, the token after each: already shifted. -100 where there is none."""
    positions: "Tensor"
    """[B, S] int64, for the rotary embedding."""
    cu_seqlens: "Tensor | None" = None
    """[documents + 1] int32, 0 to B * S: documents in the batch's rows, one row after the other;
    None where attention takes no notice of documents."""


class Loader:
    """An endless iterator of batches, fixed by ``seed``.

    The sequences of one epoch are all there are, in an order drawn from (seed, epoch); the next
    epoch follows at once, so a batch may hold the end of one and the start of another. The n-th
    sequence that a run sees depends on n and ``seed`` alone: the state is one integer, and a run
    that goes on from it sees what it would have seen, with another batch size too.

    A thread reads READ_AHEAD batches ahead, which are no part of the state. What goes wrong in it
    is raised when the batch is asked for.
    """

    def __init__(self, sequences: Sequences, batch_size: int, seed: int, position: int = 0) -> None:
        """``position``: sequences consumed before, as ``state()`` gave it."""
        self._sequences = sequences
        self._batch_size = batch_size
        self._seed = seed
        self._position = position
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: deque[Future[Batch]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._read_ahead()
        batch = self._ahead[0].result()
        self._ahead.popleft()
        self._position += self._batch_size
        return batch

    def ready(self, seconds: float) -> bool:
        """Wait until the next batch is there or could not be read, or ``seconds`` have passed.

        Returns whether the batch can be asked for now without waiting.
        """
        self._read_ahead()
        return bool(wait([self._ahead[0]], seconds).done)

    def state(self) -> int:
        """Sequences consumed so far."""
        return self._position

    def _read_ahead(self) -> None:
        while len(self._ahead) <= READ_AHEAD:
            position = self._position + len(self._ahead) * self._batch_size
            self._ahead.append(self._thread.submit(self._batch, position))

    def _batch(self, position: int) -> Batch:
        rows = range(position, position + self._batch_size)
        return collate(self._sequences, [self._sequences.drawn(row, self._seed) for row in rows])


def fixed_batches(sequences: Sequences, batch_size: int, limit: int) -> Iterator[Batch]:
    """``limit`` sequences (or all, where there are fewer), spread evenly and always the same.

    The last batch is smaller where ``batch_size`` does not divide their number.
    """
    indices = sequences.spread(limit)
    for start in range(0, len(indices), batch_size):
        yield collate(sequences, indices[start : start + batch_size])


def collate(sequences: Sequences, indices: list[int]) -> Batch:
    """The sequences at ``indices`` as one batch, in that order."""
    import torch  # here: preparing data needs none of it

    rows = [sequences[index] for index in indices]
    length = sequences.sequence_length
    starts = [row * length + s.starts for row, s in enumerate(rows) if s.starts is not None]
    cu_seqlens = np.concatenate([*starts, [len(rows) * length]]).astype(np.int32)
    return Batch(
        torch.from_numpy(np.stack([row.tokens for row in rows])),
        torch.from_numpy(np.stack([row.labels for row in rows])),
        torch.from_numpy(np.stack([row.positions for row in rows])),
        torch.from_numpy(cu_seqlens) if starts else None,
    )
