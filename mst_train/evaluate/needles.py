"""Needles in a haystack, and chains of assignments: RULER's tasks of retrieval and tracing.

The tasks of "RULER: What's the Real Context Size of Your Long-Context Language Models?" (Hsieh et
al., 2024, section 3), with texts of our own. A needle is a line with a key, a word, and a number.
"""

from collections.abc import Iterable
from random import Random

from mst_train.config import RulerConfig
from mst_train.evaluate.probe import Line, Text
from mst_train.evaluate.vocabulary import WORDS

INTRODUCTION = "Some lines of this text say which number belongs to which key.\n"
NEEDLE = "Key {key} {number}.\n"
ASSIGNED = "Some lines of this text give values to variables.\n"


def niah_single(settings: RulerConfig, depth: float, generator: Random) -> Text:
    """One needle."""
    return _one_asked(1, settings, depth, generator)


def niah_multikey(settings: RulerConfig, depth: float, generator: Random) -> Text:
    """A needle among others with other keys."""
    return _one_asked(settings.needles, settings, depth, generator)


def _one_asked(count: int, settings: RulerConfig, depth: float, generator: Random) -> Text:
    keys, numbers = _drawn(count, count, settings, generator)
    places = [depth, *(generator.random() for _ in keys[1:])]
    question = f"Which number belongs to {keys[0]}? Key {keys[0]}"
    return _needles(zip(places, keys, numbers, strict=True), question, [("", f" {numbers[0]}")])


def niah_multivalue(settings: RulerConfig, generator: Random) -> Text:
    """Several needles with one key: all their numbers, in the text's order."""
    (key,), numbers = _drawn(1, settings.needles, settings, generator)
    places = sorted(generator.random() for _ in numbers)
    question = f"Which numbers belong to {key}, in the order of the text? Key {key}"
    found = ((place, key, number) for place, number in zip(places, numbers, strict=True))
    return _needles(found, question, [("", f" {number}") for number in numbers])


def niah_multiquery(settings: RulerConfig, generator: Random) -> Text:
    """Several needles with a key each: the numbers of all keys, in the question's order."""
    keys, numbers = _drawn(settings.needles, settings.needles, settings, generator)
    found = [(generator.random(), key, number) for key, number in zip(keys, numbers, strict=True)]
    question = f"Which numbers belong to {', '.join(keys)}? Key {keys[0]}"
    given = ["", *(f" {key}" for key in keys[1:])]
    wanted = [f" {number}" for number in numbers]
    return _needles(found, question, list(zip(given, wanted, strict=True)))


def vt(settings: RulerConfig, generator: Random) -> Text:
    """Variable tracking: all variables that have a value, in the order in which they got it."""
    chains, size = settings.chains, settings.hops + 1
    names = generator.sample(WORDS, chains * size)
    _, numbers = _drawn(0, chains, settings, generator)
    turns = [chain for chain in range(chains) for _ in range(size)]
    generator.shuffle(turns)
    done = [0] * chains
    lines = []
    for place, chain in zip(sorted(generator.random() for _ in turns), turns, strict=True):
        at = chain * size + done[chain]
        value = f"VAR {names[at - 1]}" if done[chain] else numbers[chain]
        lines.append((place, Line(f"VAR {names[at]} = {value}.\n")))
        done[chain] += 1
    question = (
        f"Which variables have the value {numbers[0]}, in the order of their assignment? They are"
    )
    return Text(ASSIGNED, lines, question, [("", f" {name}") for name in names[:size]])


def _needles(
    found: Iterable[tuple[float, str, str]], question: str, answer: list[tuple[str, str]]
) -> Text:
    """found: (place, key, number) of each needle."""
    lines = [(at, Line(NEEDLE.format(key=key, number=number))) for at, key, number in found]
    return Text(INTRODUCTION, lines, question, answer)


def _drawn(
    keys: int, numbers: int, settings: RulerConfig, generator: Random
) -> tuple[list[str], list[str]]:
    """So many keys and so many numbers, no two of them the same."""
    drawn = generator.sample(range(10**settings.digits), numbers)
    return generator.sample(WORDS, keys), [f"{number:0{settings.digits}}" for number in drawn]
