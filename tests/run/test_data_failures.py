"""Data that are damaged or vanish while a run reads them: its work is saved, and it goes on."""

import json
import shutil
from pathlib import Path

import pytest

import mst_train.run.train as training
from mst_train.data import Loader, checked
from mst_train.data.checked import CheckedArray
from mst_train.errors import DataError, TrainingError
from mst_train.evaluate import validation
from mst_train.run.train import train


def losses(config):
    lines = Path(config.run.dir, "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}


@pytest.fixture
def config(small_config, change, tmp_path, monkeypatch):
    """A run with data in small blocks in a cache of its own, and one checkpoint, at the end."""
    monkeypatch.setattr(checked, "BLOCK_BYTES", 1 << 10)
    cache = tmp_path / "cache"
    tokenizers = Path(small_config.data.cache_dir, "tokenizers")
    if tokenizers.exists():
        shutil.copytree(tokenizers, cache / "tokenizers")
    return change(small_config, **{"data.cache_dir": str(cache), "checkpoint.every": 100})


def another(config, change):
    return change(config, **{"run.dir": config.run.dir + "_again"})


def tokens_file(config):
    (path,) = Path(config.data.cache_dir).glob("corpora/*/shards/*.tokens")
    return path


def refused(config):
    """The message of the run that cannot go on, and the last step that it finished."""
    with pytest.raises(TrainingError) as caught:
        train(config)
    message = str(caught.value)
    assert message.startswith("the data cannot be read any further: ")
    done = max(losses(config))
    assert f"Everything up to step {done} is saved: the same command continues" in message
    latest = Path(config.run.dir, "checkpoints/latest").read_text().strip()
    assert latest == f"step_{done:08d}"
    return message, done


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_damaged_block_that_is_met_late(config, change, monkeypatch, accumulation):
    config = change(
        config,
        **{"train.accumulation_steps": accumulation, "train.eval_every": 0, "train.steps": 12},
    )
    met = []
    check = CheckedArray._check

    def record(array, file, known, block):
        check(array, file, known, block)
        met.append((array.path, block, len(losses(config)) if met_a_step(config) else 0))

    with monkeypatch.context() as patch:
        patch.setattr(CheckedArray, "_check", record)
        train(config)
    path = tokens_file(config)
    # The last block that is read before step 7 is over; batches are read two ahead.
    block, after = next((b, n) for p, b, n in reversed(met) if p == path and n < 7)
    assert after >= 1
    raw = path.read_bytes()
    damaged = bytearray(raw)
    damaged[block * checked.BLOCK_BYTES + 5] ^= 1
    path.write_bytes(damaged)
    again = another(config, change)
    message, done = refused(again)
    assert f"{path} is damaged: bytes {block * checked.BLOCK_BYTES} to " in message
    assert "their checksum differs" in message
    assert 1 <= done < 12
    with pytest.raises(TrainingError, match="up to step"):  # nothing has been repaired
        train(again)
    path.write_bytes(raw)
    train(again)
    assert losses(again) == losses(config)


def met_a_step(config):
    return Path(config.run.dir, "metrics.jsonl").exists()


def delete(path):
    path.unlink()


def delete_everything(path):
    shutil.rmtree(path.parent.parent)


def cut_short(path):
    """Under a memory map this would kill the process."""
    with path.open("r+b") as file:
        file.truncate(100)


def fill_with_zeros(path):
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))


@pytest.mark.parametrize(
    ("vanish", "reason"),
    [
        (delete, "cannot be read (No such file or directory)"),
        (delete_everything, "cannot be read (No such file or directory)"),
        (cut_short, "has 100 bytes where "),
        (fill_with_zeros, "is damaged: bytes "),
    ],
)
def test_data_that_vanish(config, change, monkeypatch, tmp_path, vanish, reason):
    config = change(config, **{"train.steps": 10, "train.eval_every": 0})
    train(config)
    shutil.copytree(config.data.cache_dir, tmp_path / "copy")
    again = another(config, change)
    step = training.train_step

    def vanishing(*arguments):
        if len(losses(again)) == 2:
            vanish(tokens_file(again))
        return step(*arguments)

    path = tokens_file(again)
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", vanishing)
        message, done = refused(again)
    assert f"{path} {reason}" in message
    assert 3 <= done < 10
    shutil.rmtree(config.data.cache_dir)
    shutil.copytree(tmp_path / "copy", config.data.cache_dir)
    train(again)
    assert losses(again) == losses(config)


def test_files_that_are_put_in_their_place_again_are_read_on(config, change, monkeypatch):
    """The same tokens in a new file, as a backup or another process leaves them."""
    train(config)
    again = another(config, change)
    step = training.train_step

    def replaced(*arguments):
        path = tokens_file(again)
        copy = path.with_name("copy")
        shutil.copyfile(path, copy)
        copy.replace(path)
        return step(*arguments)

    monkeypatch.setattr(training, "train_step", replaced)
    train(again)
    assert losses(again) == losses(config)


def test_a_validation_that_cannot_read(config, change, monkeypatch):
    train(config)
    again = another(config, change)
    fixed_batches = validation.fixed_batches

    def failing(*arguments):
        if met_a_step(again) and losses(again):
            raise OSError(5, "Input/output error", "shards/000000.tokens")
        return fixed_batches(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "fixed_batches", failing)
        message, done = refused(again)
    assert "Input/output error: 'shards/000000.tokens'" in message and done == 3
    train(again)
    assert losses(again) == losses(config)


def test_data_and_disk_fail_together(config, change, monkeypatch):
    """Both are told."""
    train(config)
    again = another(config, change)
    read = Loader._batch

    def failing(loader, position):
        if position >= 3:
            Path(again.run.dir, "checkpoints").write_text("not a folder")
            raise OSError(116, "Stale file handle")
        return read(loader, position)

    monkeypatch.setattr(Loader, "_batch", failing)
    with pytest.raises(TrainingError, match=r"Stale file handle; and cannot write the checkpoint"):
        train(again)


def test_a_bug_keeps_its_traceback(config, monkeypatch):
    def failing(loader, position):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Loader, "_batch", failing)
    with pytest.raises(ZeroDivisionError):
        train(config)
    assert not issubclass(ZeroDivisionError, DataError)
