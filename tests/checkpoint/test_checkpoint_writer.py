"""Checkpoints written in the background: the same, and nothing that goes wrong is lost."""

import json
import threading
import time
from concurrent import futures
from pathlib import Path

import pytest
import torch

import mst_train.checkpoint.writer as module
from mst_train.checkpoint.files import complete_checkpoints, load_part, save_checkpoint
from mst_train.checkpoint.writer import CheckpointWriter, on_host
from mst_train.config import CheckpointConfig
from mst_train.errors import TrainingError
from mst_train.run.train import train


@pytest.fixture
def writer(tmp_path):
    made = CheckpointWriter(tmp_path, CheckpointConfig(keep=5))
    yield made
    made.close()


def hold_back(monkeypatch):
    """An event without which no checkpoint is written."""
    go = threading.Event()

    def waiting(*arguments):
        assert go.wait(300)
        return save_checkpoint(*arguments)

    monkeypatch.setattr(module, "save_checkpoint", waiting)
    return go


def losses(config):
    lines = Path(config.run.dir, "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model.tie_embeddings": True},
        {
            "precision": "bf16_master",
            "optimizer.in_backward": True,
            "optimizer.max_grad_norm": None,
        },
    ],
)
def test_it_writes_the_same_bytes(small_config, change, settings):
    config = change(small_config, **settings, **{"train.steps": 4})
    other = change(
        config, **{"run.dir": small_config.run.dir + "_waiting", "checkpoint.background": False}
    )
    train(config)
    train(other)
    assert losses(config) == losses(other)
    for step in ("step_00000002", "step_00000004"):
        for part in ("model", "optimizer", "random"):
            a, b = (Path(c.run.dir, "checkpoints", step, f"{part}.pt") for c in (config, other))
            assert a.read_bytes() == b.read_bytes(), (step, part)


def test_what_is_written_is_the_state_at_the_time(tmp_path, writer, monkeypatch):
    go = hold_back(monkeypatch)
    weight = torch.ones(4)
    state = {"model": {"w": weight, "same": weight[1:]}, "trainer": {"losses": [1.0], "step": 1}}
    writer.save(1, state)
    weight.zero_()
    state["trainer"]["losses"].append(2.0)
    state["trainer"]["step"] = 2
    assert not complete_checkpoints(tmp_path)
    assert not writer.failed
    go.set()
    writer.wait()
    (path,) = complete_checkpoints(tmp_path)
    model = load_part(path, "model")
    assert torch.equal(model["w"], torch.ones(4)) and torch.equal(model["same"], torch.ones(3))
    assert load_part(path, "trainer") == {"losses": [1.0], "step": 1}


def test_one_is_written_at_a_time(tmp_path, writer, monkeypatch):
    go = hold_back(monkeypatch)
    writer.save(1, {"trainer": {"step": 1}})
    threading.Timer(0.2, go.set).start()
    writer.save(2, {"trainer": {"step": 2}})
    assert (tmp_path / "step_00000001/COMPLETE").exists()
    writer.close()
    names = [path.name for path in complete_checkpoints(tmp_path)]
    assert names == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("background", [True, False])
def test_a_failure_ends_the_run_at_the_next_step(small_config, change, monkeypatch, background):
    def failing(folder, step, *rest):
        if step == 4:
            raise TrainingError("the disk is gone")
        return save_checkpoint(folder, step, *rest)

    config = change(small_config, **{"train.steps": 40, "checkpoint.background": background})
    save = CheckpointWriter.save

    def until_it_has_failed(writer, step, state):
        save(writer, step, state)
        if writer._pending is not None:
            futures.wait([writer._pending])

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", failing)
        patch.setattr(CheckpointWriter, "save", until_it_has_failed)
        with pytest.raises(TrainingError, match="the disk is gone"):
            train(config)
    assert max(losses(config)) == 4
    (path,) = complete_checkpoints(Path(config.run.dir, "checkpoints"))
    assert path.name == "step_00000002"


def test_a_failure_of_the_last_checkpoint_is_not_missed(small_config, change, monkeypatch):
    def failing(*_):
        time.sleep(0.3)
        raise TrainingError("the disk is gone")

    config = change(small_config, **{"checkpoint.every": 6})
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", failing)
        with pytest.raises(TrainingError, match="the disk is gone"):
            train(config)
    assert not Path(config.run.dir, "summary.json").exists()


def test_a_run_that_fails_waits_for_its_checkpoint(small_config, monkeypatch):
    import mst_train.run.train as training

    step, save = training.train_step, module.save_checkpoint

    def crash_at_three(*arguments):
        if len(losses(small_config)) == 2:
            raise RuntimeError("a bug")
        return step(*arguments)

    def slowly(*arguments):
        time.sleep(0.3)
        return save(*arguments)

    monkeypatch.setattr(training, "train_step", crash_at_three)
    monkeypatch.setattr(module, "save_checkpoint", slowly)
    with pytest.raises(RuntimeError, match="a bug"):
        train(small_config)
    (path,) = complete_checkpoints(Path(small_config.run.dir, "checkpoints"))
    assert path.name == "step_00000002"


def test_a_copy_shares_what_was_shared():
    layer = torch.nn.Linear(3, 2)
    state = layer.state_dict()
    state["tied"] = state["weight"]
    state["row"] = state["weight"][1]
    copied = on_host(state)
    assert type(copied) is type(state) and copied._metadata == state._metadata
    for key, value in state.items():
        assert torch.equal(copied[key], value)
        assert copied[key].data_ptr() != value.data_ptr()
    assert copied["tied"].data_ptr() == copied["weight"].data_ptr()
    assert copied["row"].untyped_storage().data_ptr() == copied["weight"].data_ptr()
    assert on_host([(1, "a", None)]) == [(1, "a", None)]
