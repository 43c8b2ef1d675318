"""A probe: a text whose end asks for what stands in it, in tokens, as long as asked for.

Its parts are tokenised one by one, which costs little for a text of any length and gives the same
tokens every time. What is left of the length is filler.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, dropwhile, islice, pairwise, zip_longest
from math import prod

from mst_train.data import Vocabulary
from mst_train.errors import UserError
from mst_train.evaluate.vocabulary import FILLER, WORDS

LINE_END = ".\n"


@dataclass(frozen=True)
class Probe:
    """One text of a task.

    tokens: the answer, or its last part, at their end. answer: the places in ``tokens`` of what is
    to be predicted, each from what stands before it. depth: where what is asked for is hidden, from
    0 (the beginning) to 1 (before the question); None where it is in no single place. chance: the
    share of the answer's tokens that are right where each is drawn from those that could be in its
    place; exact_chance: that all are.
    """

    task: str
    tokens: list[int]
    answer: list[int]
    depth: float | None
    chance: float
    exact_chance: float

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Text:
    """What a probe says.

    hidden: (place from 0 to 1, line) of each line in the filler. question: up to the answer.
    answer: pairs of what is given and, after it, what is to be predicted: a number or one of WORDS,
    with a space before it.
    """

    introduction: str
    hidden: list[tuple[float, "Line"]]
    question: str
    answer: list[tuple[str, str]]


@dataclass(frozen=True)
class Line:
    """A line, or what stands before its ``words``, each with a space before it, and LINE_END."""

    text: str
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Pieces:
    """The tokens of parts of texts."""

    tokenizer: Vocabulary
    _words: dict[str, list[int]] = field(default_factory=dict)

    def first(self, text: str) -> list[int]:
        """The tokens of a text that stands by itself."""
        tokens: list[int] = next(self.tokenizer.encode_arrays([text])).tolist()
        return tokens

    def after(self, before: str, text: str) -> list[int]:
        """The tokens of ``text`` where it follows ``before``.

        Not those of ``text`` alone: many tokenizers begin every text with a space or a token of
        its own.
        """
        pairs = zip_longest(self.first(before + text), self.first(before))
        rest = dropwhile(lambda pair: pair[0] == pair[1], pairs)
        return [token for token, _ in rest if token is not None]

    def word(self, word: str) -> list[int]:
        """The tokens of a word, which begins with a space, where it follows another word."""
        if word not in self._words:
            self._words[word] = self.after("a", word)
        return self._words[word]

    def line(self, line: Line) -> list[int]:
        """The tokens of a line that follows another."""
        if not line.words:
            return self.after("\n", line.text)
        words = [token for word in line.words for token in self.word(word)]
        return [*self.after("\n", line.text), *words, *self.after("a", LINE_END)]


def made(task: str, pieces: Pieces, text: Text, length: int, depth: float | None) -> Probe:
    """The probe of ``length`` tokens that says ``text``; UserError where it has no room for it.

    A hidden line stands before a whole line of filler, the nearest one above its place. The first
    line of the filler lacks what of it has no room.
    """
    introduction = pieces.first(text.introduction)
    lines = [(place, pieces.line(line)) for place, line in text.hidden]
    question = pieces.after("\n", text.question)
    end, answer = list[int](), list[int]()
    for given, wanted in text.answer:
        end += pieces.word(given) if given else []
        expected = pieces.after("a", wanted)
        answer += range(len(end), len(end) + len(expected))
        end += expected
    rest = len(introduction) + sum(len(line) for _, line in lines) + len(question) + len(end)
    fill, borders = _filler(pieces, room(task, length, rest))
    tokens, done = introduction, 0
    for place, line in sorted(lines, key=lambda found: found[0]):
        border = max(at for at in borders if at <= place * len(fill))
        tokens = [*tokens, *fill[done:border], *line]
        done = border
    tokens += [*fill[done:], *question]
    odds = [chance for _, wanted in text.answer for chance in chances(pieces, wanted)]
    return Probe(
        task,
        [*tokens, *end],
        [len(tokens) + at for at in answer],
        depth,
        sum(odds) / len(odds),
        prod(odds),
    )


def room(task: str, length: int, needed: int) -> int:
    """How many of ``length`` tokens are left; UserError where ``needed`` are too many."""
    if needed > length:
        raise UserError(
            f"{task}: a text of {length} tokens has no room for what it hides and asks, which "
            f"takes {needed} with this tokenizer: set evaluation.lengths to that or more"
        )
    return length - needed


def chances(pieces: Pieces, wanted: str) -> list[float]:
    """How probable each token of a number or a word is, of those that could be in its place.

    A digit is one of ten, whatever stands before it; a token of a word is as frequent as it is in
    those of WORDS that begin as this one does so far.
    """
    tokens = pieces.after("a", wanted)
    if wanted.strip().isdecimal():
        texts = [pieces.tokenizer.decode([token]) for token in tokens]
        return [10.0 ** -sum(map(str.isdecimal, text)) for text in texts]
    others = [pieces.word(f" {word}") for word in WORDS]
    beginnings = [
        sum(other[:size] == tokens[:size] for other in others) for size in range(len(tokens) + 1)
    ]
    return [after / before for before, after in pairwise(beginnings)]


def _filler(pieces: Pieces, size: int) -> tuple[list[int], list[int]]:
    """``size`` tokens of filler that end with a line, and where its lines begin."""
    lines = [pieces.after("\n", line) for line in FILLER]
    whole = sum(map(len, lines))
    backwards = islice(cycle(lines[::-1]), len(lines) * (size // whole + 1))
    borders, at, taken = [0], size, list[list[int]]()
    for line in backwards:
        at -= len(line)
        taken.append(line)
        if at <= 0:
            break
        borders.append(at)
    fill = [token for line in reversed(taken) for token in line]
    return fill[len(fill) - size :], borders
