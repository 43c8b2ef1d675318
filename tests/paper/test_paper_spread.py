"""What three values say, by hand."""

import math

import pytest

from mst_train.paper.spread import spread


def test_mean_deviation_and_interval():
    found = spread([1.0, 2.0, 3.0])
    assert (found.mean, found.deviation) == (2.0, 1.0)
    assert found.half_interval == pytest.approx(4.303 / math.sqrt(3))
    assert spread([1.0, 2.0]).half_interval == pytest.approx(12.706 / 2)


def test_values_that_agree_leave_no_doubt():
    assert spread([0.5] * 4).half_interval == 0
