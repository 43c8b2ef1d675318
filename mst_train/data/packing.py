"""A stream of tokens to training sequences.

Shapes: S sequence length in tokens (``data.sequence_length``).
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mst_train.errors import UserError

IGNORED = -100
"""The label of a token after which there is nothing to predict."""


class Sequence(NamedTuple):
    tokens: Tensor
    """[S] int64, the model's input."""
    labels: Tensor
    """[S] int64, the token after each; IGNORED where there is nothing to predict."""
    positions: Tensor
    """[S] int64."""
    starts: Tensor | None
    """[documents] int64, where documents begin, the first at 0; None where it does not matter."""


class PackedSequences:
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
        tokens: NDArray[np.unsignedinteger],
        spans: NDArray[np.int64],
        sequence_length: int,
        confine_to: int | None = None,
    ) -> None:
        """
        Args:
            tokens: [corpus tokens], memory-mapped or not.
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
        window = torch.from_numpy(self._read(start, start + self.sequence_length + 1))  # [S + 1]
        tokens, labels = window[:-1], window[1:]
        positions = torch.arange(self.sequence_length)
        if self._confine_to is None:
            return Sequence(tokens, labels, positions, None)
        ends = tokens == self._confine_to
        starts = torch.cat([positions[:1], positions[1:][ends[:-1]]])
        return Sequence(
            tokens,
            labels.masked_fill(ends, IGNORED),
            positions - starts[torch.searchsorted(starts, positions, right=True) - 1],
            starts,
        )

    def _read(self, start: int, end: int) -> NDArray[np.int64]:
        """The stream's tokens [start, end)."""
        out = np.empty(end - start, np.int64)
        position = start
        span = int(np.searchsorted(self._borders, start, side="right")) - 1
        while position < end:
            stop = min(end, int(self._borders[span + 1]))
            first = int(self._spans[span, 0]) + position - int(self._borders[span])
            out[position - start : stop - start] = self._tokens[first : first + stop - position]
            position = stop
            span += 1
        return out
