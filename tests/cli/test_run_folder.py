"""Which run evaluate, generate and report read, and what they say where none is named."""

import logging
import os
import subprocess
import sys

import pytest

from mst_train.cli.run_folder import run_folder
from mst_train.evaluate.__main__ import main as evaluate
from mst_train.generate.__main__ import main as generate
from mst_train.report.__main__ import main as report

COMMANDS = pytest.mark.parametrize(
    "command", [evaluate, report, lambda given: generate([*given, "prompt=x"])]
)


def make_run(folder, seconds):
    """The first file of a run that was last written to at this time."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    os.utime(folder / "metrics.jsonl", (seconds, seconds))
    return folder


def said(caplog):
    """Without what other packages' loggers say."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("mst_train")]


@COMMANDS
def test_what_is_taken_without_run_dir_is_said(command, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "mst_train")
    make_run(tmp_path / "runs/tiny", 1)
    assert command([]) == 2
    assert said(caplog) == ["run.dir is not given: taking the run in runs/tiny"]
    caplog.clear()
    assert command(["run.dir=runs/tiny"]) == 2
    assert not said(caplog)


@COMMANDS
def test_the_newest_run_is_the_example_where_there_is_none(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, seconds in (("b", 2), ("c", 3), ("a", 1)):
        make_run(tmp_path / "runs" / name, seconds)
    assert command([]) == 2
    message = capsys.readouterr().err
    assert "there is no run in runs/tiny, which is taken where run.dir is not given" in message
    assert "such as run.dir=runs/c, the newest" in message
    assert command(["run.dir=runs/d"]) == 2
    message = capsys.readouterr().err
    assert "there is no run in runs/d: " in message
    assert "such as run.dir=runs/c, the newest" in message


@COMMANDS
def test_without_any_run_it_is_said_which_was_looked_for(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command([]) == 2
    assert capsys.readouterr().err == (
        "error: there is no run in runs/tiny, which is taken where run.dir is not given: give the "
        "folder of one as run.dir=DIR\n"
    )


def test_one_that_was_given_is_the_commands_to_miss(tmp_path, caplog):
    caplog.set_level(logging.INFO, "mst_train")
    folder = tmp_path / "tiny"
    assert run_folder(str(folder), [f"run.dir={folder}"]) == folder
    assert not said(caplog)


@pytest.mark.parametrize("command", [evaluate, lambda given: generate([*given, "prompt=x"])])
def test_an_unknown_setting_is_told_before_a_run_that_is_missing(command, capsys):
    assert command(["new_token=3"]) == 2
    assert "new_token is not a setting" in capsys.readouterr().err


@COMMANDS
def test_a_checkpoint_named_as_for_export_is_told_how_to_name_it(command, capsys):
    assert command(["checkpoint=runs/x"]) == 2
    assert "cannot use checkpoint=runs/x: " in (printed := capsys.readouterr().err)
    assert "run.dir=runs/x" in printed


@COMMANDS
def test_a_folder_alone_is_told_how_to_name_it(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/mine", 1)
    assert command(["runs/mine"]) == 2
    assert "cannot use runs/mine: name the run as run.dir=runs/mine" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "generate"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("evaluation.length=[8]", "did you mean evaluation.lengths?"),
        ("data.sequence_length=8k", "data.sequence_length=8k is not a whole number"),
        ("checkpoint=x", "name the run as run.dir=x"),
        ("model.num_layers=3", "the model and its type are the checkpoint's"),
        ("run.dir=runs/d", "such as run.dir=runs/mine"),
        ("model.from_pretrained=x run.dir=y", "both say which model"),
    ],
)
def test_a_mistake_is_answered_without_torch(command, given, message, tmp_path):
    """Which takes seconds to import."""
    make_run(tmp_path / "runs/mine", 1)
    asked = ["prompt=x"] if command == "generate" else []
    code = f"""import sys
from mst_train.{command}.__main__ import main
assert main({[*asked, *given.split()]}) == 2
assert "torch" not in sys.modules"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert message in done.stderr
