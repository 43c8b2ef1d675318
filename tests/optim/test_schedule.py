"""Learning rates: each schedule against its formula, and at its edges."""

import math

import pytest

from mst_train.config import OptimizerConfig
from mst_train.optim import learning_rate, too_short


def rates(steps, **settings):
    """Of steps 1 to ``steps``, where the highest is 0.01."""
    config = OptimizerConfig(learning_rate=0.01, **settings)
    return [learning_rate(step, steps, config) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_every_schedule_warms_up_alike(schedule):
    found = rates(110, schedule=schedule, warmup_steps=10)
    assert found[:10] == [0.01 * step / 10 for step in range(1, 11)]
    assert found[9] == 0.01 >= found[10]
    assert rates(110, schedule=schedule, warmup_steps=0)[0] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("warmup", [0, 10])
def test_cosine(warmup):
    found = rates(110, warmup_steps=warmup, min_learning_rate_ratio=0.2)
    for step in range(warmup + 1, 111):
        angle = math.pi * ((step - warmup) / (110 - warmup))
        assert found[step - 1] == 0.01 * (0.2 + 0.8 * (0.5 * (1 + math.cos(angle))))
    assert found[-1] == pytest.approx(0.002)
    assert rates(1, warmup_steps=0) == [pytest.approx(0.001)]


def test_constant():
    assert rates(50, schedule="constant", warmup_steps=5)[4:] == [0.01] * 46
    assert rates(3, schedule="constant", warmup_steps=0) == [0.01] * 3


@pytest.mark.parametrize(
    ("steps", "given", "decay"),
    [(110, 20, 20), (110, None, 11), (94, None, 9), (95, None, 10), (14, None, 1), (20, 1, 1)],
)
def test_wsd(steps, given, decay):
    """The first step of the decay is lower already, the last has the lowest, and all are a line."""
    found = rates(
        steps, schedule="wsd", warmup_steps=10, decay_steps=given, min_learning_rate_ratio=0.2
    )
    assert found[9 : steps - decay] == [0.01] * (steps - decay - 9)
    falls = [0.01 - 0.008 * k / decay for k in range(1, decay + 1)]
    assert found[steps - decay :] == pytest.approx(falls, rel=1e-12)
    assert found[steps - decay] < 0.01
    assert found[-1] == 0.01 * 0.2


def test_a_decay_can_begin_at_any_step_of_a_longer_stable_run():
    settings = {"schedule": "wsd", "warmup_steps": 10, "decay_steps": 30}
    stable = rates(1000, **settings)[:970]
    for steps in (40, 200, 999, 1001, 3000):
        found = rates(steps, **settings)
        shared = min(steps - 30, 970)
        assert found[:shared] == stable[:shared]
        assert found[-30:] == rates(1000, **settings)[-30:]


def test_a_decay_that_meets_the_warm_up():
    """The lower of the two, and the last step ends where every other run does."""
    found = rates(8, schedule="wsd", warmup_steps=6, decay_steps=6, min_learning_rate_ratio=0.0)
    sixths = [1, 2, 3, 4, 3, 2, 1, 0]
    assert found == pytest.approx([0.01 * k / 6 for k in sixths])
    early = rates(4, schedule="wsd", warmup_steps=0, decay_steps=8, min_learning_rate_ratio=0.0)
    assert early == pytest.approx([0.01 * k / 8 for k in (3, 2, 1, 0)])


@pytest.mark.parametrize(
    ("steps", "settings", "parts"),
    [
        (9, {"schedule": "cosine"}, "optimizer.warmup_steps=10: "),
        (9, {"schedule": "constant"}, "optimizer.warmup_steps=10: "),
        (14, {"schedule": "wsd", "decay_steps": 5}, "and the decay of 5 (optimizer.decay_steps): "),
        (10, {"schedule": "wsd"}, "and the decay of 1 (optimizer.decay_steps): "),
    ],
)
def test_a_run_too_short_for_its_schedule(steps, settings, parts):
    config = OptimizerConfig(learning_rate=0.01, warmup_steps=10, **settings)
    assert f"{steps} steps are fewer than optimizer.warmup_steps=10" in too_short(steps, config)
    assert parts in too_short(steps, config)
    assert max(rates(steps, warmup_steps=10, **settings)) < 0.01
    assert too_short(steps + 1, config) is None
    assert max(rates(steps + 1, warmup_steps=10, **settings)) == 0.01
