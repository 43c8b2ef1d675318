"""Pseudo-random orders that depend on their key alone.

NumPy's generators may change their streams between releases. A run that is resumed after an
upgrade must still meet the documents and sequences it has not seen yet, so the order comes from
SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014), which is
a few lines and stays as it is.
"""

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_INCREMENT = 0x9E3779B97F4A7C15


def pseudo_random_order(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of 0 .. count-1, [count] int64, fixed by ``key`` (any integers)."""
    start = np.zeros(1, np.uint64)
    for part in key:
        start = _mix(start ^ np.uint64(part & _MASK))
    # The mix is a bijection and the increment is odd, so no two indices share a sort key.
    return np.argsort(
        _mix(start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_INCREMENT))
    )


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function, element by element, modulo 2^64."""
    z = z + np.uint64(_INCREMENT)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
