"""Pseudo-random orders that depend on their key alone.

NumPy's generators may change their streams between releases. A run that is resumed after an
upgrade must still meet the documents and sequences it has not seen yet, so the order comes from
SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014), which is
a few lines and stays as it is.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_INCREMENT = 0x9E3779B97F4A7C15
_TURNS = 8


def pseudo_random(*key: int) -> int:
    """An integer of 64 bits, fixed by ``key`` (any integers)."""
    state = 0
    for part in key:
        state = _mix(state ^ (part & _MASK))
    return state


def shuffled(place: int, count: int, *key: int) -> int:
    """Element ``place`` of a permutation of 0 .. count-1, fixed by ``key``, without the others.

    A Feistel network permutes the numbers of twice as many bits as its halves have, the smallest
    such power of four that is at least ``count``; a result beyond ``count`` goes through it again
    until one is not (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    start = pseudo_random(*key)
    while True:
        left, right = place >> half, place & mask
        for turn in range(_TURNS):
            left, right = right, left ^ (_mix(start ^ (turn << 48 | right)) & mask)
        place = left << half | right
        if place < count:
            return place


def pseudo_random_order(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of 0 .. count-1, [count] int64, fixed by ``key`` (any integers)."""
    places = np.arange(1, count + 1, dtype=np.uint64)
    # The mix is a bijection and the increment is odd, so no two indices share a sort key.
    return np.argsort(_mix(places * _INCREMENT + pseudo_random(*key)))


def _mix(z: Any) -> Any:
    """SplitMix64's output function, modulo 2^64, of an integer or of each element of a uint64."""
    z = z + _INCREMENT & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31
