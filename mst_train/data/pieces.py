"""What the kinds of source have in common: pieces, documents and reports.

A source is divided into pieces, each a list of files or a range of one, by its content alone. Any
process can read any piece, and the documents of all pieces in order are those of the source.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mst_train.errors import UserError

Report = Callable[[UserError], None]
"""Takes what makes a line, row or file unusable: raises it, or notes it and has the reader go on
with the next."""


class Document(NamedTuple):
    content: str | NDArray[np.integer[Any]]
    """Text, or token ids [tokens] where the source holds those."""
    size: int
    """About how many bytes of the source it took, as ``Piece.size`` counts them."""
    more: bool = False
    """Whether this is a part of a very long document, which the next one continues."""

    @property
    def blank(self) -> bool:
        """Whether there is nothing in it to learn from."""
        if self.more:
            return False
        if isinstance(self.content, str):
            return not self.content or self.content.isspace()
        return len(self.content) == 0


@dataclass(frozen=True)
class Piece:
    """A part of a source that becomes one shard of tokens; made of JSON's types."""

    files: tuple[str, ...]
    """Relative to the source's folder; none in a data set."""
    start: int
    stop: int
    """The range of the one file or of the data set, in what its reader counts (bytes, rows, ...);
    0, 0 where whole files of text are meant."""
    size: int
    """About how many bytes of text; 0 where that is not known."""
    state: str
    """Changes when the files may have changed."""


class Reader(Protocol):
    """Reads pieces of one source; is sent to the processes that do (and so can be pickled)."""

    def read(self, piece: Piece, report: Report) -> Iterator[Document]:
        """The documents of a piece, blank ones included, in order.

        Raises:
            UserError: a file cannot be read at all, or is not the one that was divided.
        """
        ...


def refuse(problem: UserError) -> None:
    """The report that stops at the first problem."""
    raise problem


def ignore(problem: UserError) -> None:
    """The report that goes on; for readers whose problems another one reports."""


def after_newline(text: str, start: int, end: int) -> int:
    """The last place in (start, end] that follows a newline; ``end`` where there is none."""
    return text.rfind("\n", start, end) + 1 or end


def before_line(text: str, start: int, end: int) -> int:
    """The last place in (start, end) where a line begins with more than whitespace.

    Most tokenizers keep a run of line ends and what follows it apart. Where there is no such
    place, as ``after_newline``.
    """
    place = end
    while (place := text.rfind("\n", start, place)) >= 0:
        if place + 1 < end and not text[place + 1].isspace():
            return place + 1
    return after_newline(text, start, end)


def between_words(text: str, start: int, end: int) -> int:
    """The last place in (start, end) between a line's end and a letter, or else two words.

    There the tokens of two parts are those of the whole, if the line end or space stands alone:
    GPT-2's split a run of them by what follows it, and sentencepiece's join a line end and a sign.
    Where there is no such place, as ``before_line``.
    """
    for sign in "\n", " ":
        place = end - 1
        while (place := text.rfind(sign, start + 1, place)) >= 0:
            if not text[place - 1].isspace() and text[place + 1].isalpha():
                return place + (sign == "\n")  # a space goes with its word
    return before_line(text, start, end)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ranges(count: int, parts: int) -> Iterator[tuple[int, int]]:
    """0 .. count in ``parts`` ranges of about the same length, the empty ones left out."""
    borders = [part * count // parts for part in range(parts + 1)]
    yield from ((a, b) for a, b in pairwise(borders) if a < b)
