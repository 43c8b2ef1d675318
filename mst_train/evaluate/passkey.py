"""Passkey retrieval: a number hidden in a long text, asked for at its end.

The task of "Landmark Attention" (Mohtashami and Jaggi, 2023, section 4.2): filler, somewhere in it
a sentence with a number, more filler, the question.
"""

from math import prod
from random import Random

from mst_train.evaluate.probe import Pieces, Probe, chances, room

INTRODUCTION = "Somewhere in this text is a number. Find it and remember it.\n"
FILLER = "The road was long. A door stood open. Leaves moved in the wind. Nobody came by.\n"
HIDDEN = "The number is {number}. Remember that the number is {number}.\n"
QUESTION = "What is the number? The number is"


def passkey(pieces: Pieces, length: int, depth: float, digits: int, generator: Random) -> Probe:
    """A probe of ``length`` tokens with its number at ``depth``.

    The number stands before a whole line of filler, the nearest one above its depth. Raises
    UserError where ``length`` is too short.
    """
    number = "".join(generator.choices("0123456789", k=digits))
    introduction = pieces.first(INTRODUCTION)
    filler = pieces.after("\n", FILLER)
    hidden = pieces.after("\n", HIDDEN.format(number=number))
    question = pieces.after("\n", QUESTION)
    answer = pieces.after(QUESTION, f" {number}")
    left = room("passkey", length, sum(map(len, (introduction, hidden, question, answer))))
    before = int(depth * left) // len(filler) * len(filler)
    fill = (filler * (left // len(filler) + 1))[:left]
    tokens = [*introduction, *fill[:before], *hidden, *fill[before:], *question, *answer]
    odds = chances(pieces, f" {number}")
    places = list(range(length - len(answer), length))
    return Probe("passkey", tokens, places, float(depth), sum(odds) / len(odds), prod(odds))
