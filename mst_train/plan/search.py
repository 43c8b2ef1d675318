"""The longest sequence that fits."""

import itertools
from collections.abc import Callable

STEP = 1024
LONGEST = 2**24
"""No search goes beyond 16M tokens."""


def longest_fitting(
    excess: Callable[[int], int], step: int = STEP, start: tuple[int, int] | None = None
) -> int | None:
    """The largest multiple of ``step`` whose ``excess`` is not positive; None where there is none.

    excess: bytes beyond the budget at a length: close to a straight line, which is what makes the
        search short. It stops where a length fits and the next does not.
    start: two lengths to begin with, multiples of ``step``; None: short ones.
    """
    known: dict[int, int] = {}

    def at(length: int) -> int:
        if length not in known:
            known[length] = excess(length)
        return known[length]

    low, high = start or (8 * step, 16 * step)
    if at(low) > 0:
        low, high = step, 2 * step
    if at(low) > 0:
        return None
    for attempt in itertools.count():
        fitting = max(length for length, value in known.items() if value <= 0)
        beyond = LONGEST // step * step + step
        too_long = min((n for n, value in known.items() if value > 0), default=beyond)
        if too_long - fitting <= step:
            return fitting
        if attempt % 3 == 2 and too_long in known:  # where the line is not straight
            guess = (fitting + too_long) // 2
        else:
            guess = _crossing(known, fitting, too_long, fallback=high)
        guess = guess // step * step
        at(min(max(guess, fitting + step), too_long - step))
    raise AssertionError("not reached")


def _crossing(known: dict[int, int], fitting: int, too_long: int, fallback: int) -> int:
    """Where a line through the two nearest known lengths is zero."""
    if len(known) < 2:
        return fallback
    if too_long in known:
        first, second = fitting, too_long
    else:
        first, second = sorted(known)[-2:]
    slope = (known[second] - known[first]) / (second - first)
    if slope <= 0:
        return 2 * fitting
    return int(second - known[second] / slope)
