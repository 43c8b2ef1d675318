"""What a few seeds say together: mean, standard deviation and Student's interval."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5% points of Student's t distribution with 1, 2, ... degrees of freedom."""


class Spread(NamedTuple):
    values: list[float]
    mean: float
    deviation: float
    """Of the sample, n - 1 in the denominator."""
    half_interval: float
    """The mean's 95% interval reaches this far to both sides."""


def spread(values: Sequence[float]) -> Spread:
    """Of 2 to 10 values, drawn independently of each other from a normal distribution."""
    count = len(values)
    deviation = statistics.stdev(values)
    half = STUDENT[count - 2] * deviation / math.sqrt(count)
    return Spread(list(values), statistics.fmean(values), deviation, half)
