"""A disk that is full or a folder that is gone while a run writes to it."""

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import mst_train.run.train as training
from mst_train.__main__ import main
from mst_train.checkpoint import writer as checkpoint_writer
from mst_train.checkpoint.files import complete_checkpoints, save_checkpoint
from mst_train.data import load_data
from mst_train.errors import TrainingError, UserError
from mst_train.export import main as export
from mst_train.prepare.__main__ import main as prepare
from mst_train.run.train import train


def losses(config):
    lines = Path(config.run.dir, "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}


@contextmanager
def at_step(number, config, happens):
    """``happens`` is called before the step with this number is computed."""
    step = training.train_step

    def interrupted(*arguments):
        path = Path(config.run.dir, "metrics.jsonl")
        if path.exists() and len(losses(config)) == number - 1:
            happens()
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", interrupted)
        yield


@pytest.fixture
def limit_files():
    """limit_files(bytes): no file can be written beyond this size, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def lift_limit():
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("size", "background"),
    [(50_000, True), (50_000, False), (100, False)],  # in a part, and in the marker
)
def test_a_checkpoint_that_does_not_fit(
    small_config, change, limit_files, background, size, monkeypatch
):
    whole = change(small_config, **{"checkpoint.background": background})
    train(whole)
    config = change(whole, **{"run.dir": small_config.run.dir + "_full"})
    if size == 100:
        # The parts fit and the marker does not: the limit comes after them.
        import mst_train.checkpoint.files as checkpoint

        replace = checkpoint.replace_text

        def without_room(path, text):
            if "step_00000004" in str(path):
                limit_files(size)
            try:
                replace(path, text)
            finally:
                lift_limit()

        monkeypatch.setattr(checkpoint, "replace_text", without_room)
        with pytest.raises(TrainingError) as caught:
            train(config)
        monkeypatch.undo()
    else:

        def full():
            while not Path(config.run.dir, "checkpoints/latest").exists():
                time.sleep(0.01)
            limit_files(size)

        with at_step(4, config, full), pytest.raises(TrainingError) as caught:
            train(config)
        lift_limit()
    message = str(caught.value)
    folder = Path(config.run.dir, "checkpoints")
    assert message.startswith(f"cannot write the checkpoint {folder}/step_00000004: ")
    assert "File too large" in message and "the same command continues" in message
    assert names(folder) == ["latest", "step_00000002"]
    assert (folder / "latest").read_text() == "step_00000002\n"
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000002"]
    train(config)
    assert losses(config) == losses(whole)


def test_records_that_do_not_fit(small_config, change, limit_files):
    train(small_config)
    config = change(small_config, **{"run.dir": small_config.run.dir + "_full"})
    metrics = Path(config.run.dir, "metrics.jsonl")
    with (
        at_step(4, config, lambda: limit_files(metrics.stat().st_size + 10)),
        pytest.raises(TrainingError, match=r"metrics\.jsonl cannot be written \(File too large\)"),
    ):
        train(config)
    lift_limit()
    assert metrics.read_text().splitlines()[-1] == '{"step": 4'
    train(config)
    assert losses(config) == losses(small_config)


def test_a_folder_that_is_gone(small_config, change):
    train(small_config)
    config = change(
        small_config,
        **{"run.dir": small_config.run.dir + "_gone", "checkpoint.background": False},
    )
    folder = Path(config.run.dir, "checkpoints")

    def replace_by_a_file():
        shutil.rmtree(folder)
        folder.write_text("")

    with (
        at_step(4, config, replace_by_a_file),
        pytest.raises(TrainingError, match=r"cannot write the checkpoint .*step_00000004: "),
    ):
        train(config)
    folder.unlink()
    train(config)
    assert losses(config) == losses(small_config)


def remove(run):
    shutil.rmtree(run)


def move(run):
    run.rename(run.with_name("moved"))


def remove_records(run):
    (run / "metrics.jsonl").unlink()


def replace_records(run):
    (run / "metrics.jsonl").rename(run / "metrics.old")
    shutil.copyfile(run / "metrics.old", run / "metrics.jsonl")


@pytest.mark.parametrize("happens", [remove, move, remove_records, replace_records])
@pytest.mark.parametrize("last", [False, True])
def test_a_run_whose_records_are_gone_has_not_succeeded(small_config, change, happens, last):
    config = change(small_config, **{"train.steps": 4, "checkpoint.every": 8})
    run = Path(config.run.dir)
    if last:  # after the last record
        config = change(config, **{"checkpoint.every": 4})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                checkpoint_writer,
                "save_checkpoint",
                lambda *arguments: happens(run) or save_checkpoint(*arguments),
            )
            with pytest.raises(TrainingError, match=r"metrics\.jsonl was removed|No such file"):
                train(config)
    else:
        with (
            at_step(3, config, lambda: happens(run)),
            pytest.raises(TrainingError, match=r"metrics\.jsonl was removed, moved or replaced"),
        ):
            train(config)
    assert not (run / "summary.json").exists()
    assert run.exists() == (happens not in (remove, move))


def test_a_finished_run_on_storage_that_is_read_alone(small_config, change, caplog):
    config = change(small_config, **{"train.steps": 2})
    summary = train(config)
    run = Path(config.run.dir)
    run.chmod(0o500)
    with permissions_count(), caplog.at_level("INFO", "mst_train"):
        assert train(config) == summary
    run.chmod(0o700)
    assert "is finished" in caplog.text and "summary.json cannot be written" in caplog.text


def test_a_full_disk_is_the_same_for_all_commands(
    small_config, change, tmp_path, limit_files, capsys
):
    """Something that may go by itself: 1, not what a scheduler takes for a wrong setting."""
    train(change(small_config, **{"train.steps": 2}))
    data = small_config.data
    limit_files(1000)
    with pytest.raises(TrainingError, match=r"data\.cache_dir=.* cannot be written"):
        load_data(change(data, cache_dir=str(tmp_path / "cache")))
    assert export([f"checkpoint={small_config.run.dir}", f"output={tmp_path / 'model'}"]) == 1
    arguments = [f"data.source={data.source}", "data.tokenizer_vocab_size=512"]
    assert prepare([*arguments, f"prepare.output={tmp_path / 'out'}", "prepare.workers=1"]) == 1
    lift_limit()
    assert export([f"checkpoint={small_config.run.dir}", f"output={tmp_path / 'model'}"]) == 0


def test_output_that_cannot_be_written_is_named():
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "mst_train", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 1
    assert result.stderr == "error: standard output: No space left on device\n"


@contextmanager
def permissions_count():
    """For root, too: its right to write everywhere (CAP_DAC_OVERRIDE) is put aside."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    rights = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, rights) == 0
    before = rights[0]
    rights[0] &= ~0b110  # and CAP_DAC_READ_SEARCH
    assert libc.capset(header, rights) == 0
    try:
        yield
    finally:
        rights[0] = before
        assert libc.capset(header, rights) == 0


def test_a_folder_that_cannot_be_written(small_config, change, tmp_path):
    train(small_config)
    config = change(
        small_config,
        **{"run.dir": f"{tmp_path}/closed/run", "checkpoint.background": False},
    )
    (tmp_path / "closed").mkdir(mode=0o500)
    with (
        permissions_count(),
        pytest.raises(UserError, match=r"closed/run cannot be written \(Permission denied\)"),
    ):
        train(config)
    assert list((tmp_path / "closed").iterdir()) == []
    (tmp_path / "closed").chmod(0o700)
    folder = Path(config.run.dir, "checkpoints")
    with (
        permissions_count(),
        at_step(4, config, lambda: folder.chmod(0o500)),
        pytest.raises(TrainingError) as caught,
    ):
        train(config)
    message = str(caught.value)
    assert message.startswith(f"cannot write the checkpoint {folder}/step_00000004: ")
    assert "Permission denied" in message and "the same command continues" in message
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000002"]
    folder.chmod(0o700)
    train(config)
    assert losses(config) == losses(small_config)


@pytest.mark.slow
def test_the_command_on_a_full_disk(tmp_path, small_config, monkeypatch):
    """One message, status 1, and with room again the same command does the rest."""
    load_data(small_config.data)  # what the cache needs fits
    data = small_config.data
    arguments = [
        *("run.dir=run", "train.steps=4", "checkpoint.every=2"),
        *(f"data.source={data.source}", f"data.cache_dir={data.cache_dir}"),
        *("data.tokenizer_vocab_size=512", "data.validation_fraction=0.05"),
        *("data.sequence_length=100", "model.vocab_size=512", "model.hidden_size=32"),
        *("model.intermediate_size=88", "model.num_layers=2", "logging=wandb_disabled"),
    ]
    result = subprocess.run(
        [sys.executable, "-m", "mst_train", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert result.returncode == 1
    assert "error: cannot write the checkpoint run/checkpoints/step_00000002: " in result.stderr
    assert "Traceback" not in result.stderr
    assert names(tmp_path / "run/checkpoints") == []
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    assert names(tmp_path / "run/checkpoints") == ["latest", "step_00000002", "step_00000004"]
