"""A stream of tokens to training sequences.

Shapes: S sequence length in tokens (``data.sequence_length``).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mst_train.errors import UserError


class PackedSequences:
    """A stream cut into windows of S + 1 tokens, S apart: S inputs and, one token on, S labels.

    The stream is the documents one after the other, each with its end-of-document token: a sequence
    may start in the middle of a document and run over several, and attention and positions (0 to
    S - 1) take no notice of the borders. Neighbouring windows share one token, the last label of
    one and the first input of the next, so that every token but the stream's first is a label
    exactly once. What is left at the end of the stream, fewer than S tokens, is dropped.

    ``len()`` is the number of sequences. Item i is (inputs, labels, positions), each [S] int64;
    inputs and labels are views of one window. Only the pages of the token file that hold the
    sequence are read; the object itself holds 24 bytes per span.
    """

    def __init__(
        self, tokens: NDArray[np.unsignedinteger], spans: NDArray[np.int64], sequence_length: int
    ) -> None:
        """
        Args:
            tokens: [corpus tokens], memory-mapped or not.
            spans: [spans, 2], the token ranges [start, end) that make up the stream, in order.

        Raises:
            UserError: the stream is shorter than one sequence.
        """
        self.sequence_length = sequence_length
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

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        if not 0 <= index < self._count:
            raise IndexError(f"sequence {index} of {self._count}")
        start = index * self.sequence_length
        window = torch.from_numpy(self._read(start, start + self.sequence_length + 1))  # [S + 1]
        return window[:-1], window[1:], torch.arange(self.sequence_length)

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
