"""Advice where memory does not suffice under ZeRO, and its buckets are what is in the way."""

import logging

import pytest
import torch

import mst_train.plan.before as before
from mst_train.cli.compose import compose
from mst_train.engine.zero import reduce_bucket_size
from mst_train.errors import UserError
from mst_train.memory.devices import Device
from mst_train.plan import buckets
from mst_train.plan.__main__ import main
from mst_train.plan.before import before_training
from mst_train.plan.choose import choose
from mst_train.plan.config import configured_target, read
from mst_train.plan.predict import predict
from mst_train.units import GIB

CPU = torch.device("cpu")
ZERO = ["model=llama_bench", "parallel.zero_stage=2", "precision=bf16_master"]
ZERO += ["data.sequence_length=1024", "memory.policy=mst"]
SETTING = "parallel.deepspeed.zero_optimization.reduce_bucket_size"


def planned(*arguments):
    return read([*ZERO, "plan.gpus=2", "plan.device=cpu", *arguments])


def peak(*arguments):
    config = planned(*arguments)
    return predict(config, configured_target(config)).simulation.peak_bytes


def between(one, other):
    """A budget in GiB that the first keeps to and the second does not."""
    low, high = peak(one), peak(other)
    assert low < high
    return f"memory.device_budget_gib={(low + high) / 2 / GIB}"


SMALLEST, MIDDLE = f"{SETTING}=1000000", f"{SETTING}=10000000"
WHOLE = f"{SETTING}={reduce_bucket_size(compose(ZERO).model)}"  # as without it


@pytest.mark.parametrize(("enough", "too_large"), [(MIDDLE, WHOLE), (SMALLEST, MIDDLE)])
def test_the_largest_buckets_that_fit_are_named(enough, too_large):
    budget = between(enough, too_large)
    with pytest.raises(UserError) as caught:
        before_training(compose([*ZERO, budget]), CPU, 2)
    assert str(caught.value).endswith(f"finds the longest. It also fits with {enough}.")
    assert before_training(compose([*ZERO, budget, enough]), CPU, 2).fits


@pytest.mark.parametrize(
    "others",
    [
        (),  # what is missing is more than buckets take
        ("parallel.zero_stage=0",),
        ("parallel.zero_stage=1",),  # which has none in bf16
        (f"{SETTING}=1000000",),
    ],
)
def test_they_are_not_named_where_they_do_not_help(others):
    share = 0.999 if others else 0.5
    tight = planned(*others, f"memory.device_budget_gib={share * peak(*others) / GIB}")
    target = configured_target(tight)
    prediction = predict(tight, target)
    assert not prediction.fits
    assert buckets.that_fits(tight, target, prediction.shortage_bytes) is None


def test_no_step_is_predicted_where_buckets_are_far_too_small(monkeypatch):
    monkeypatch.setattr(buckets, "predict", None)
    config = planned()
    assert buckets.that_fits(config, configured_target(config), 10 * GIB) is None


def test_a_gpu_that_may_try_is_told_too(monkeypatch, caplog):
    """Inside what a prediction may be off by, where a run is warned and not refused."""
    config = compose(ZERO)
    device = Device("a GPU", "cuda", 24 * GIB)
    monkeypatch.setattr(before, "this_device", lambda _: device)
    found = before_training(config, torch.device("cuda"), 2).simulation
    caplog.set_level(logging.WARNING)
    device = Device("a GPU", "cuda", found.peak_bytes - 1)
    before_training(config, torch.device("cuda"), 2)
    assert f"chooses settings that fit. It also fits with {SETTING}=10000000" in caplog.text


def test_the_planner_names_them(capsys):
    budget = between(MIDDLE, WHOLE)
    assert main([*ZERO, "plan.gpus=2", "plan.device=cpu", budget]) == 0
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert f"It fits with {MIDDLE}\n" in shown
    assert main([*ZERO, "plan.gpus=2", "plan.device=cpu", budget, MIDDLE]) == 0
    assert SETTING not in capsys.readouterr().out


def test_auto_names_them_where_nothing_else_of_its_own_fits():
    lean = ["optimizer.offload=host", "memory.offload=host", "memory.keep.attention=0"]
    chunks = "memory.block_chunk_tokens=1024"
    ends = []
    for arguments in ([SMALLEST, chunks], [chunks]):
        config = planned(*lean, *arguments)
        found = predict(config, configured_target(config)).simulation
        ends.append(found.peak_bytes + found.host_bytes)  # a CPU has one memory for both
    assert ends[0] < ends[1]
    lean += ["memory.policy=auto", f"memory.device_budget_gib={sum(ends) / 2 / GIB}"]
    tight = planned(*lean)
    with pytest.raises(UserError) as caught:
        choose(tight, configured_target(tight))
    words = str(caught.value).partition("It fits with ")[2].partition(":")[0]
    assert words.startswith(f"{SETTING}=")
    better = planned(*lean, words)
    assert choose(better, configured_target(better)).chosen.fits
