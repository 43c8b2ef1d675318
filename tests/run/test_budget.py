"""A run's length in tokens: the steps it comes to, wherever and with whatever it goes on."""

import json
import logging
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mst_train.config import Config, DataConfig, TrainConfig
from mst_train.run.budget import with_steps
from mst_train.run.train import train

FRESH = {"step": 0, "tokens": 0}


def records(config):
    lines = Path(config.run.dir, "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "tokens" in record]


def steps_of(tokens, progress=FRESH, data_parallel=1):
    """Where a step of one process has 2 x 3 sequences of 10 tokens."""
    length = TrainConfig(steps=7, tokens=tokens, micro_batch_size=2, accumulation_steps=3)
    config = Config(train=length, data=DataConfig(sequence_length=10))
    return with_steps(config, progress, data_parallel).train.steps


@pytest.mark.parametrize(
    ("tokens", "data_parallel", "steps"),
    [
        (None, 1, 7),
        (1, 1, 1),
        (60, 1, 1),
        (61, 1, 2),
        (600, 1, 10),
        (600, 4, 3),
        (2 * 10**9, 8, 4166667),
    ],
)
def test_steps_of_a_fresh_run(tokens, data_parallel, steps):
    assert steps_of(tokens, data_parallel=data_parallel) == steps


def test_other_processes_train_what_is_missing():
    before = {"step": 4, "tokens": 4 * 60}
    assert steps_of(600, before) == 10
    assert steps_of(600, before, data_parallel=2) == 4 + 3
    assert steps_of(600, before, data_parallel=8) == 4 + 1
    assert steps_of(240, before) == steps_of(100, before) == 4  # nothing is missing


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.integers(1, 10**6),
    st.lists(st.tuples(st.integers(1, 64), st.floats(0, 1)), min_size=1, max_size=4),
)
def test_the_budget_is_kept_whatever_processes_a_run_has_had(tokens, parts):
    """It ends at the first step that reaches it, even when each part of it was cut off early."""
    progress = FRESH
    for data_parallel, done in parts:
        left = steps_of(tokens, progress, data_parallel) - progress["step"]
        assert (left == 0) == (progress["tokens"] >= tokens)
        new = round(left * done)
        progress = {
            "step": progress["step"] + new,
            "tokens": progress["tokens"] + new * 60 * data_parallel,
        }
    left = steps_of(tokens, progress, data_parallel) - progress["step"]
    end = progress["tokens"] + left * 60 * data_parallel
    assert end >= tokens
    assert left == 0 or end - 60 * data_parallel < tokens


def test_a_run_of_so_many_tokens(small_config, change, caplog):
    """Accumulated in two micro-batches of 100, which also are what the schedule goes by."""
    config = change(
        small_config,
        **{"train.steps": 1000, "train.tokens": 1050, "train.accumulation_steps": 2},
    )
    with caplog.at_level(logging.INFO, "mst_train"):
        summary = train(config)
    assert "train.tokens=1,050: the run ends after step 6, with 200 tokens in a step" in caplog.text
    assert [r["tokens"] for r in records(config)] == [200, 400, 600, 800, 1000, 1200]
    assert records(config)[-1]["learning_rate"] == pytest.approx(3e-4)
    assert yaml.safe_load(Path(config.run.dir, "config.yaml").read_text())["train"]["steps"] == 6

    caplog.clear()
    with caplog.at_level(logging.INFO, "mst_train"):
        assert train(config) == summary
    assert "is finished: set train.tokens higher to go on" in caplog.text
    assert "now and was" not in caplog.text  # neither train.steps: both are 6

    # 300 tokens more, in steps of 100.
    more = change(config, **{"train.tokens": 1500, "train.accumulation_steps": 1})
    train(more)
    assert [r["tokens"] for r in records(config)[6:]] == [1300, 1400, 1500]
    assert "train.steps is 9 now and was 6 at" in caplog.text
    assert "train.tokens is 1500 now and was 1050 at" in caplog.text


def test_tokens_are_the_steps_that_they_come_to(small_config, change):
    """To the last digit, in a run that is cut off and goes on too."""
    steps = change(small_config, **{"train.steps": 5})
    train(steps)
    tokens = change(
        small_config,
        **{"train.steps": 1000, "train.tokens": 500, "run.dir": f"{small_config.run.dir}_tokens"},
    )
    resumed = {"run.dir": f"{small_config.run.dir}_resumed", "run.resume": tokens.run.dir}
    train(tokens)
    last = Path(tokens.run.dir, "checkpoints/step_00000005/COMPLETE")
    last.unlink()  # step 4 is the last whole one
    train(change(tokens, **resumed))
    rows = [[(r["loss"], r["learning_rate"]) for r in records(c)] for c in (steps, tokens)]
    assert rows[0] == rows[1]
    again = [(r["loss"], r["learning_rate"]) for r in records(change(tokens, **resumed))]
    assert again == rows[0][4:]


def test_a_budget_too_short_for_its_warm_up_is_warned_of(small_config, change, caplog):
    train(change(small_config, **{"train.tokens": 200, "optimizer.warmup_steps": 3}))
    assert "the run's 2 steps are fewer than optimizer.warmup_steps=3" in caplog.text
