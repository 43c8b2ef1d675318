"""A stream of tokens to training sequences.

Shapes: S sequence length in tokens (``data.sequence_length``).
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mst_train.data.corpus import TokenFiles, across
from mst_train.data.order import shuffled
from mst_train.errors import UserError

Ints = NDArray[np.int64]

IGNORED = -100
"""The label of a token after which there is nothing to predict."""


class Sequence(NamedTuple):
    tokens: Ints
    """[S] int64, the model's input."""
    labels: Ints
    """[S] int64, the token after each; IGNORED where there is nothing to predict."""
    positions: Ints
    """[S] int64."""
    starts: Ints | None
    """[documents] int64, where documents begin, the first at 0; None where it does not matter."""


class Sequences(ABC):
    """Training sequences that can be had by number, and the order in which a run sees them."""

    sequence_length: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sequence:
        """Reads from disk; ``UserError`` where a file is damaged."""

    def drawn(self, position: int, seed: int) -> int:
        """The number of the sequence that a run with this seed sees as its ``position``-th.

        Each epoch holds every sequence once, in an order of its own.
        """
        epoch, place = divmod(position, len(self))
        return shuffled(place, len(self), seed, epoch)

    def spread(self, limit: int) -> list[int]:
        """The numbers of ``limit`` sequences (or all, where there are fewer), spread evenly."""
        count = min(limit, len(self))
        return [place * len(self) // count for place in range(count)]


class PackedSequences(Sequences):
    """A stream cut into windows of S + 1 tokens, S apart: S inputs and, one token on, S labels.

    The stream is the documents one after the other, each with its end-of-document token. A sequence
    may start in the middle of a document and run over several; attention and positions (0 to S - 1)
    take no notice of the borders, unless documents are confined to themselves. Neighbouring windows
    share one token, the last label of one and the first input of the next, so that every token but
    the stream's first is a label exactly once. What is left at the end of the stream, fewer than S
    tokens, is dropped.

    ``len()`` is the number of sequences, item i a ``Sequence``. Only the pages of the token file
    that hold it are read; the object itself holds 24 bytes per span.
    """

    def __init__(
        self,
        tokens: TokenFiles | NDArray[np.unsignedinteger],
        spans: Ints,
        sequence_length: int,
        confine_to: int | None = None,
    ) -> None:
        """
        Args:
            tokens: the corpus's.
            spans: [spans, 2], the token ranges [start, end) that make up the stream, in order.
            confine_to: the end-of-document token, where each document is to stand for itself:
                positions restart after it, and it has no label, since what follows is unrelated.

        Raises:
            UserError: the stream is shorter than one sequence.
        """
        self.sequence_length = sequence_length
        self._confine_to = confine_to
        self._tokens = tokens
        self._spans = spans
        # [spans + 1]: span k holds the stream's tokens borders[k] to borders[k + 1].
        self._borders = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])
        self.stream_tokens = int(self._borders[-1])
        self._count = (self.stream_tokens - 1) // sequence_length
        if self._count < 1:
            raise UserError(
                f"a stream of {self.stream_tokens} tokens is shorter than one sequence of "
                f"data.sequence_length={sequence_length} and the token after it: set "
                f"data.sequence_length to {max(self.stream_tokens - 1, 0)} or less, or give more "
                f"text"
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sequence:
        if not 0 <= index < self._count:
            raise IndexError(f"sequence {index} of {self._count}")
        start = index * self.sequence_length
        window = self._read(start, start + self.sequence_length + 1)  # [S + 1]
        tokens, labels = window[:-1], window[1:]
        positions = np.arange(self.sequence_length)
        if self._confine_to is None:
            return Sequence(tokens, labels, positions, None)
        ends = tokens == self._confine_to
        starts = np.concatenate([positions[:1], positions[1:][ends[:-1]]])
        return Sequence(
            tokens, np.where(ends, IGNORED, labels), positions_from(starts, positions), starts
        )

    def _read(self, start: int, end: int) -> Ints:
        """The stream's tokens [start, end)."""
        parts = []
        for span, a, b in across(self._borders, start, end):
            first = int(self._spans[span, 0])
            parts.append(self._tokens[first + a : first + b])
        return np.concatenate(parts).astype(np.int64)


def positions_from(starts: Ints, positions: Ints) -> Ints:
    """``positions``, counted from the last of ``starts`` before each."""
    return positions - starts[np.searchsorted(starts, positions, side="right") - 1]
