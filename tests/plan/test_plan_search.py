"""The longest sequence: found where a length fits and the next does not, in few predictions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mst_train.plan.search import LONGEST, longest_fitting


def count(function):
    calls = []

    def counted(length):
        calls.append(length)
        return function(length)

    return counted, calls


@given(
    slope=st.floats(0.1, 1e6),
    bend=st.floats(0, 1),
    budget=st.floats(1, 1e12),
    step=st.sampled_from([256, 1024, 3072]),
)
def test_the_last_length_that_fits(slope, bend, budget, step):
    def excess(n):
        return int(slope * n + bend * n * n - budget)

    found = longest_fitting(excess, step)
    if found is None:
        assert excess(step) > 0
    else:
        assert found % step == 0
        assert excess(found) <= 0
        assert excess(found + step) > 0 or found >= LONGEST - step


def test_a_line_takes_few_predictions():
    excess, calls = count(lambda n: 300_000 * n - 30 * 2**30)
    assert longest_fitting(excess) == 30 * 2**30 // 300_000 // 1024 * 1024
    assert len(calls) <= 5
    assert len(calls) == len(set(calls))


@pytest.mark.parametrize("first", [1, 5, 13, 200])
def test_a_step_in_the_line(first):
    """Where settings change with the length, the line jumps."""

    def excess(n):
        return n // 1024 - first + (50 if n > 64 * 1024 else 0)

    found = longest_fitting(excess)
    assert excess(found) <= 0 < excess(found + 1024)


def test_nothing_fits():
    assert longest_fitting(lambda n: 1) is None


def test_everything_fits():
    assert longest_fitting(lambda n: -1) == LONGEST
