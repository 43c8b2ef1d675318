"""Sequence-parallel attention gives what one process gives: loss and all gradients, in fp64."""

import itertools

import pytest
from exact import POLICIES, largest_differences
from processes import run

from mst_train.distributed.ulysses import Heads

PLAIN = {}
WINDOWS = {
    "sliding_window": 7,
    "sliding_window_pattern": ["sliding", "full"],
    "attention_softcap": 20.0,
}
HEADS = [(12, 12), (12, 4), (12, 2), (12, 1), (12, 3), (12, 6)]
"""Query and key-value heads: for 4 processes enough, fewer, one, and numbers that do not divide."""


def cases():
    for policy, packed in itertools.product(POLICIES, (False, True)):
        yield {"policy": policy, "packed": packed, "heads": 12, "keys": 2, "options": PLAIN}
    for (heads, keys), packed in itertools.product(HEADS, (False, True)):
        settings = {"heads": heads, "keys": keys, "packed": packed}
        yield {"policy": "mst", "options": PLAIN, **settings}
    for policy, packed in itertools.product(("vanilla", "mst"), (False, True)):
        yield {"policy": policy, "packed": packed, "heads": 12, "keys": 2, "options": WINDOWS}


SLOW = {"marks": pytest.mark.slow}


@pytest.mark.parametrize("degree", [2, pytest.param(3, **SLOW), pytest.param(4, **SLOW)])
def test_loss_and_gradients(degree, tmp_path):
    expected = list(cases())
    results = run(largest_differences, degree, tmp_path, degree=degree, cases=expected)
    for differences in results:
        for case, difference in zip(expected, differences, strict=True):
            assert difference < 1e-11, case


def test_heads_of_each_process():
    heads = Heads(queries=12, keys=3, processes=4)
    assert [heads.query_heads(p) for p in range(4)] == [slice(p, p + 3) for p in (0, 3, 6, 9)]
    assert [heads.key_heads(p) for p in range(4)] == [
        slice(0, 1),
        slice(0, 2),
        slice(1, 3),
        slice(2, 3),
    ]
    assert [heads.readers(p) for p in range(4)] == [None, [0, 1, 1], [0, 0, 1], None]
    assert heads.some_keys_shared
    assert not Heads(queries=8, keys=4, processes=4).some_keys_shared


@pytest.mark.parametrize(("queries", "keys", "processes"), [(4, 2, 8), (6, 2, 4), (6, 4, 2)])
def test_heads_that_cannot_be_shared(queries, keys, processes):
    with pytest.raises(ValueError, match=f"{queries} query heads"):
        Heads(queries, keys, processes)
