"""Words counted in a list: RULER's tasks of aggregation.

The tasks of "RULER" (Hsieh et al., 2024, section 3). What is asked for depends on all of the text,
and on no single place in it. The list is as long as the text has room for.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random

from mst_train.config import RulerConfig
from mst_train.evaluate.probe import LINE_END, Line, Pieces, Text, room
from mst_train.evaluate.vocabulary import WORDS

INTRODUCTION = "A list of words follows.\n"
LIST = "List:"
COMMON = (
    "Which {count} words are the most frequent in the list, in the order in which they first stand "
    "there? They are"
)
FREQUENT = (
    "Which {count} words are the most frequent in the list, the most frequent one first? They are"
)


def cwe(settings: RulerConfig, pieces: Pieces, length: int, generator: Random) -> Text:
    """Common words extraction: some words are half of the list, all others the other half."""
    asked, others = settings.common_words, len(WORDS) - settings.common_words

    def counts(size: int) -> list[int]:
        each = size // (2 * asked)
        least, more = divmod(size - asked * each, others)
        return [each] * asked + [least + (number < more) for number in range(others)]

    names = generator.sample(WORDS, len(WORDS))
    question = COMMON.format(count=asked)
    words = _list(
        *("cwe", pieces, length, question, names, asked),
        counts,
        lambda found: found[0] > found[asked],
    )
    generator.shuffle(words)
    return _asked(words, question, sorted(names[:asked], key=words.index))


def fwe(settings: RulerConfig, pieces: Pieces, length: int, generator: Random) -> Text:
    """Frequent words extraction: a word's frequency falls with a power of its rank."""
    asked = settings.frequent_words
    shares = [rank**-settings.alpha for rank in range(1, len(WORDS) + 1)]

    def counts(size: int) -> list[int]:
        found = [int(size * share / sum(shares)) for share in shares]
        return [found[0] + size - sum(found), *found[1:]]

    names = generator.sample(WORDS, len(WORDS))
    question = FREQUENT.format(count=asked)
    words = _list(
        *("fwe", pieces, length, question, names, asked),
        counts,
        lambda found: all(a > b for a, b in pairwise(found[: asked + 1])),
    )
    generator.shuffle(words)
    return _asked(words, question, names[:asked])


def _list(
    task: str,
    pieces: Pieces,
    length: int,
    question: str,
    names: Sequence[str],
    asked: int,
    counts: Callable[[int], list[int]],
    clear: Callable[[list[int]], bool],
) -> list[str]:
    """The most words that the text has room for, in no order; UserError where that is too few.

    counts: how often each of ``names``, the ``asked`` ones first, is in a list of so many words.
    clear: whether with these counts the question has one answer.
    """
    costs = [len(pieces.word(f" {name}")) for name in names]
    frame = [pieces.first(INTRODUCTION), pieces.after("\n", LIST), pieces.after("a", LINE_END)]
    around = sum(map(len, [*frame, pieces.after("\n", question)])) + sum(costs[:asked])

    def needed(size: int) -> int:
        return around + sum(n * cost for n, cost in zip(counts(size), costs, strict=True))

    size = bisect_right(range(length), length, key=needed) - 1
    while size > 0 and not (needed(size) <= length and clear(counts(size))):
        size -= 1
    if size <= 0:
        least = next(size for size in range(1, 10**6) if clear(counts(size)))
        room(task, length, needed(least))
    return [name for name, n in zip(names, counts(size), strict=True) for _ in range(n)]


def _asked(words: Sequence[str], question: str, answer: Sequence[str]) -> Text:
    line = Line(LIST, [f" {word}" for word in words])
    return Text(INTRODUCTION, [(0.0, line)], question, [("", f" {word}") for word in answer])
