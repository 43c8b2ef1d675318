"""A run's numbers in TensorBoard's own files."""

import importlib.util

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mst_train.errors import UserError
from mst_train.run.run import Run
from mst_train.run.train import train


def events(folder):
    """(step, value) by name, as TensorBoard shows them."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def test_it_has_the_runs_numbers_once(small_config, change):
    """Also of a run that was killed after step 5 and goes on from the checkpoint of step 4."""
    config = change(small_config, **{"logging.tensorboard": True})
    losses = {}

    class Killed(Exception):
        pass

    finish = Run.finish_step

    def finish_step(run, *arguments):
        finish(run, *arguments)
        if run.step == 5 and not losses:
            losses[5] = run.summary["loss"]
            raise Killed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Run, "finish_step", finish_step)
        with pytest.raises(Killed):
            train(config)
    summary = train(config)
    found = events(f"{config.run.dir}/tensorboard")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert found["train/loss"][-1][1] == pytest.approx(summary["loss"], rel=1e-6)
    assert found["train/loss"][4][1] == pytest.approx(losses[5], rel=1e-6)
    assert found["val/loss"][-1] == (6, pytest.approx(summary["val_loss"], rel=1e-6))
    assert found["memory/predicted/parameters"][0][1] > 0


def test_it_is_not_there_unless_asked_for(small_config, tmp_path, change):
    train(change(small_config, **{"train.steps": 1}))
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_without_the_package_it_says_so(small_config, tmp_path, change, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        train(change(small_config, **{"logging.tensorboard": True}))
    assert not (tmp_path / "run").exists()
