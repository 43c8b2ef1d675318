"""The n-gram model counts what it says, and nothing else."""

from collections import Counter
from math import log

import numpy as np
import pytest

from mst_train.paper import reach as module
from mst_train.paper.reach import reach

VOCABULARY = 5


def counted(training, texts, window, first, smoothing):
    """The same model, token by token."""

    def context(tokens, place, order):
        return tuple(tokens[max(place - order, 0) : place]) + ("start",) * max(order - place, 0)

    total = []
    for text in texts:
        for place in range(first, len(text)):
            probability = 1 / VOCABULARY
            for order in module.ORDERS:
                here = context(text, place, order)
                seen = Counter(
                    training[t] for t in range(len(training)) if context(training, t, order) == here
                )
                seen.update(
                    text[t]
                    for t in range(max(place - window, 0), place)
                    if context(text, t, order) == here
                )
                probability = (seen[text[place]] + smoothing * probability) / (
                    seen.total() + smoothing
                )
            total.append(-log(probability))
    return sum(total) / len(total)


@pytest.mark.parametrize("window", [0, 1, 7, 20])
def test_it_is_the_model_that_is_described(window):
    random = np.random.default_rng(window)
    training, texts = random.integers(0, VOCABULARY, 60), random.integers(0, VOCABULARY, (2, 40))
    expected = min(
        counted(training.tolist(), texts.tolist(), window, 20, smoothing)
        for smoothing in module.SMOOTHINGS
    )
    assert reach(training, texts, [window], VOCABULARY, 20)[window] == pytest.approx(expected)


def test_a_text_that_repeats_itself_is_told_once_the_window_reaches_back():
    random = np.random.default_rng(0)
    training, half = random.integers(0, 50, 500), random.integers(0, 50, (3, 64))
    losses = reach(training, np.concatenate([half, half], axis=1), (0, 32, 64), 50, 64)
    assert losses[64] < 0.7 * losses[32]
    assert losses[32] == pytest.approx(losses[0], rel=0.1)


def test_other_texts_are_not_its_own_past():
    random = np.random.default_rng(0)
    training, text = random.integers(0, 50, 500), random.integers(0, 50, (1, 64))
    alone = reach(training, text, (64,), 50, 0)
    twice = reach(training, np.repeat(text, 2, axis=0), (64,), 50, 0)
    assert twice == pytest.approx(alone)
