"""Losses and gradients that are not finite, and spikes: the run stops, or leaves the step out."""

import json
import math
from pathlib import Path

import pytest
import torch

import mst_train.run.train as training
from mst_train.config import TrainConfig
from mst_train.engine.step import BadStep
from mst_train.errors import TrainingError
from mst_train.optim import learning_rate
from mst_train.run.bad_steps import BadSteps
from mst_train.run.train import train
from mst_train.tracking.metrics import Metrics

SKIP = {"train.bad_step": "skip"}
IN_BACKWARD = {"optimizer.in_backward": True, "optimizer.max_grad_norm": None}


def records(config):
    lines = Path(config.run.dir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if "val_loss" not in line]


def outcomes(config):
    return {r["step"]: r.get("loss") or r["skipped"] for r in records(config)}


def scaled_loss(factor):
    """The last micro-batch's loss is multiplied by ``factor``."""

    def spoil(model, batches):
        calls = []

        def scale(module, inputs, output):
            calls.append(1)
            return (output[0] * factor, output[1]) if len(calls) == len(batches) else None

        return model.register_forward_hook(scale)

    return spoil


def bad_gradient(model, batches):
    """The loss stays as it is; one gradient is infinite."""
    weight = model.blocks[0].attention.query.weight
    return weight.register_hook(lambda gradient: gradient / 0)


def spoil_steps(patch, config, steps, spoil):
    """Spoil the steps with these numbers."""
    real = training.train_step

    def spoiled(engine, batches, *rest):
        path = Path(config.run.dir, "metrics.jsonl")
        done = len(records(config)) if path.exists() else 0
        if done + 1 not in steps:
            return real(engine, batches, *rest)
        handle = spoil(engine.model, batches)
        try:
            return real(engine, batches, *rest)
        finally:
            handle.remove()

    patch.setattr(training, "train_step", spoiled)


def run(config, steps, spoil):
    with pytest.MonkeyPatch.context() as patch:
        spoil_steps(patch, config, steps, spoil)
        return train(config)


def saved(config, part):
    path = Path(config.run.dir, "checkpoints/step_00000006", f"{part}.pt")
    return torch.load(path, weights_only=True)


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("spoil", "reason", "settings"),
    [
        (scaled_loss(math.nan), "the loss is nan", {}),
        (scaled_loss(math.nan), "the loss is nan", {"train.accumulation_steps": 3}),
        (scaled_loss(math.nan), "the loss is nan", {"memory.offload": "host"}),
        (scaled_loss(math.inf), "the loss is inf", IN_BACKWARD),
        (bad_gradient, "the gradient's norm is nan", {"train.accumulation_steps": 2}),
        (bad_gradient, "the gradient's norm is inf", {"precision": "bf16_master"}),
    ],
)
def test_a_skipped_step_leaves_nothing_behind(small_config, change, spoil, reason, settings):
    """Weights and states are those of a run in which the step was not even begun."""
    config = change(small_config, **SKIP, **settings)
    summary = run(config, {3}, spoil)
    (skipped,) = [r for r in records(config) if "skipped" in r]
    assert (skipped["step"], skipped["skipped"]) == (3, reason)
    assert "loss" not in skipped and "grad_norm" not in skipped
    assert [r["step"] for r in records(config)] == [1, 2, 3, 4, 5, 6]
    batch = 100 * config.train.accumulation_steps
    assert [r["tokens"] for r in records(config)] == [batch * n for n in range(1, 7)]
    for record in records(config):
        expected = learning_rate(record["step"], 6, config.optimizer)
        assert record["learning_rate"] == expected
    assert summary["skipped_steps"] == 1
    assert summary["loss"] == records(config)[-1]["loss"]

    other = change(config, **{"run.dir": config.run.dir + "_other"})

    def not_begun(*_):
        raise BadStep(reason, "", "", can_skip=True)

    run(other, {3}, not_begun)
    assert outcomes(other) == outcomes(config)
    for part in ("model", "optimizer"):
        assert_same(saved(other, part), saved(config, part))


def test_the_default_is_to_stop(small_config, change):
    config = change(small_config, **{"checkpoint.every": 1})
    with pytest.raises(BadStep, match=r"the loss is nan: .*train\.bad_step=skip"):
        run(config, {3}, scaled_loss(math.nan))
    latest = Path(config.run.dir, "checkpoints/latest").read_text().strip()
    assert latest == "step_00000002"
    train(config)
    assert list(outcomes(config)) == [1, 2, 3, 4, 5, 6]


def test_a_gradient_that_has_been_applied_cannot_be_skipped(small_config, change):
    config = change(small_config, **SKIP, **IN_BACKWARD)
    with pytest.raises(BadStep, match="this step's weights are damaged") as caught:
        run(config, {3}, bad_gradient)
    assert "train.bad_step" not in str(caught.value)
    latest = Path(config.run.dir, "checkpoints/latest").read_text().strip()
    assert latest == "step_00000002"


def test_too_many_skipped_steps_end_the_run(small_config, change):
    config = change(small_config, **SKIP, **{"train.max_skipped_steps": 2})
    with pytest.raises(TrainingError, match=r"step 4 is bad .* and so were the 2 before it"):
        run(config, {2, 3, 4}, scaled_loss(math.nan))
    other = change(config, **{"run.dir": config.run.dir + "_other"})
    assert run(other, {1, 2, 4, 5}, scaled_loss(math.nan))["skipped_steps"] == 4


SPIKES = {**SKIP, "train.spike_factor": 1.5, "train.spike_window": 3}


@pytest.mark.parametrize("settings", [{}, IN_BACKWARD, {"train.accumulation_steps": 2}])
def test_a_spike_is_left_out(small_config, change, settings):
    config = change(small_config, **SPIKES, **settings)
    run(config, {2, 4, 6}, scaled_loss(5.0))  # at step 2 there are no 3 losses yet
    expected = ["loss", "loss", "loss", "skipped", "loss", "skipped"]
    assert [next(k for k in r if k in ("loss", "skipped")) for r in records(config)] == expected
    assert "a spike: above" in outcomes(config)[4]


def test_a_spike_stops_the_run_where_bad_steps_do(small_config, change):
    config = change(small_config, **{**SPIKES, "train.bad_step": "stop"})
    with pytest.raises(BadStep, match=r"a spike: above .* train\.spike_factor"):
        run(config, {4}, scaled_loss(5.0))


def test_a_resumed_run_decides_as_it_would_have(small_config, change):
    """The losses that the median is taken of, and the skipped steps in a row, are saved."""
    settings = {**SPIKES, "train.max_skipped_steps": 2, "checkpoint.every": 1}
    whole = change(small_config, **settings)
    run(whole, {4, 5}, scaled_loss(5.0))
    cut = change(whole, **{"run.dir": small_config.run.dir + "_cut"})
    for last in (3, 4, 6):
        with pytest.MonkeyPatch.context() as patch:
            log = Metrics.log

            def stop_after(metrics, record, last=last, log=log):
                log(metrics, record)
                if record.get("step") == last + 1 and "tokens" in record:
                    raise KeyboardInterrupt

            patch.setattr(Metrics, "log", stop_after)
            spoil_steps(patch, cut, {4, 5}, scaled_loss(5.0))
            if last < 6:
                with pytest.raises(KeyboardInterrupt):
                    train(cut)
            else:
                train(cut)
    assert outcomes(cut) == outcomes(whole)

    third = change(whole, **{"run.dir": small_config.run.dir + "_third"})
    with pytest.raises(TrainingError, match="step 6 is bad"):
        run(third, {4, 5, 6}, scaled_loss(5.0))
    with pytest.raises(TrainingError, match="step 6 is bad"):  # resumed from step 5
        run(third, {4, 5, 6}, scaled_loss(5.0))


def test_the_limit_is_a_multiple_of_the_median():
    config = TrainConfig(spike_factor=2.0, spike_window=3)
    steps = BadSteps(config, {})
    for loss in (9.0, 1.0):
        steps.good(loss)
        assert steps.loss_limit == math.inf
    for loss, limit in ((4.0, 8.0), (2.0, 4.0), (3.0, 6.0)):  # the last three: 9 1 4, 1 4 2, 4 2 3
        steps.good(loss)
        assert steps.loss_limit == limit
    again = BadSteps(config, steps.state())
    assert again.loss_limit == 6.0
    assert BadSteps(TrainConfig(spike_window=3), steps.state()).loss_limit == math.inf
