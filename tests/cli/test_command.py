"""python -m mst_train, as a user runs it."""

import contextlib
import errno
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import mst_train
from mst_train.__main__ import COMMANDS, main
from mst_train.bench import __main__ as bench
from mst_train.cli.command import ALLOCATOR, run_command
from mst_train.errors import UserError
from mst_train.plan import __main__ as plan


def command(*arguments):
    return [sys.executable, "-m", "mst_train", *arguments]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(folder, *arguments, environment=ENVIRONMENT):
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def arguments(corpus, cache):
    return [
        f"data.source={corpus}",
        f"data.cache_dir={cache}",
        "data.sequence_length=64",
        "data.validation_fraction=0.05",
        "data.tokenizer_vocab_size=512",
        "model.vocab_size=512",
        "model.hidden_size=32",
        "model.intermediate_size=88",
        "model.num_layers=2",
        "logging=wandb_disabled",
        "train.steps=40",
        "checkpoint.every=5",
    ]


def losses(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {r["step"]: r["loss"] for r in lines if "loss" in r}


def test_it_trains_and_says_where(tmp_path, arguments, monkeypatch, caplog):
    result = run(tmp_path, *arguments, "train.steps=4", "run.name=short")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "The run's folder: runs/short"
    assert "step 4/4: loss" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "train.steps=4", "run.name=short"]) == 0
    assert "has come to step 4 of 4 and is finished: set train.steps higher" in caplog.text
    assert main([*arguments, "train.steps=3", "run.name=short"]) == 0
    assert "has already come to step 4, beyond train.steps=3: set train.steps hi" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", ["optimizer.name=adamw", "optimizer.name=muon", "model.attention_sinks=true"]
)
def test_killed_and_resumed_it_gives_the_same_losses(tmp_path, arguments, setting):
    arguments = [*arguments, setting]
    assert main([*arguments, f"run.dir={tmp_path}/whole"]) == 0
    metrics = tmp_path / "cut" / "metrics.jsonl"
    process = subprocess.Popen(
        command(*arguments, "run.dir=cut"),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while not metrics.exists() or metrics.read_text().count('"loss"') < 12:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert max(losses(metrics)) < 40
    resumed = run(tmp_path, *arguments, "run.dir=cut", "run.resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing from cut/checkpoints/step_" in resumed.stderr
    assert losses(metrics) == losses(tmp_path / "whole" / "metrics.jsonl")


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            ["train.stepz=1", "data.sequence_length=no"],
            ["train.stepz is not a setting: did you mean train.steps?", "data.sequence_length=no"],
        ),
        (["data.sequence_length=0", "model.num_heads=5"], ["data.sequence_length=0", "num_heads"]),
        (["data.source=./missing.txt"], ["./missing.txt"]),
        (
            [
                "+experiment=llama3_8b_seq60k",
                "data.sequence_length=2048",
                "memory.device_budget_gib=20",
            ],
            ["llama3_8b_seq60k does not fit", "weights"],
        ),
    ],
)
def test_bad_input_is_one_clear_message(tmp_path, arguments, messages, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert all(line.startswith("error: ") for line in printed.splitlines())
    for message in messages:
        assert message in printed
    assert list(tmp_path.iterdir()) == []


def test_a_bench_that_is_trained_is_told_which_command_measures(caplog, capsys):
    assert main(["+bench=step", "--config"]) == 0
    assert "python -m mst_train.bench +bench=step measures" in caplog.text
    caplog.clear()
    assert main(["--config"]) == 0
    assert not caplog.text


@pytest.mark.parametrize("given", [["data.source=./missing.txt"], ["model.vocab_size=300"]])
def test_data_that_cannot_be_are_told_without_torch(tmp_path, given):
    script = (
        "import sys; from mst_train.__main__ import main; "
        "status = main(); print('torch' in sys.modules, status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *given],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert result.stdout == "False 2\n", result.stderr
    assert result.stderr.count("error: ") == 1


def test_an_empty_corpus_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "blank.txt").write_text("\n \n")
    monkeypatch.chdir(tmp_path)
    assert main(["data.source=./text", f"data.cache_dir={tmp_path / 'cache'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "./text" in line
    assert not (tmp_path / "runs").exists()


def test_help_and_config(tmp_path):
    help_page = run(tmp_path, "--help").stdout
    assert "llama3_8b_seq60k" in help_page
    assert "optimizer.learning_rate=0.0003" in help_page
    assert len(run(tmp_path, "--help", "optimizer").stdout) < len(help_page) / 4
    assert "did you mean optimizer?" in run(tmp_path, "--help", "optimiser").stderr
    assert "there are run, train, data" in run(tmp_path, "--help", "zzz").stderr
    assert "model.rope_scaling.factor=1.0" in run(tmp_path, "--help", "rope_scaling").stdout
    shown = run(tmp_path, "--config", "train.steps=3").stdout
    assert "steps: 3" in shown


@pytest.mark.parametrize("name", ["", *(f".{name}" for name in COMMANDS), ".paper"])
def test_every_command_has_a_version(name, capsys):
    module = "mst_train.export" if name == ".export" else f"mst_train{name}.__main__"
    assert importlib.import_module(module).main(["--version"]) == 0
    assert capsys.readouterr().out == f"mst_train {mst_train.__version__}\n"
    with contextlib.suppress(SystemExit):  # argparse's
        importlib.import_module(module).main(["--help"])
    assert len(re.findall(r"^  --version +print the version", capsys.readouterr().out, re.M)) == 1


@pytest.mark.parametrize(
    "given", [["--version"], ["--help"], ["--help", "optimizer"], ["--config"]]
)
def test_of_several_processes_one_answers(given, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    answers = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(given) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] and not answers[1]


@pytest.mark.parametrize(
    "given",
    [["train.stepz=3"], ["train.seed=1,2"], ["--help", "optimiser"], ["--config-dir"]],
)
def test_of_several_processes_one_says_what_all_refuse(given, monkeypatch, capsys):
    """They compare it in the launcher's store (``told_together``), which is left out here."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("mst_train.distributed.init.told_together", lambda error: UserError([]))
    assert main(given) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_without_a_terminal_or_home(tmp_path, arguments):
    """A scheduler's environment: no terminal, no home folder, another working folder."""
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    run_dir = f"run.dir={tmp_path / 'run'}"
    result = run("/", *arguments, "train.steps=2", run_dir, environment=environment)
    assert result.returncode == 0, result.stderr


def test_a_closed_stream_and_one_that_knows_no_unicode(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))

    def command(arguments):
        print("日本", flush=True)
        print("nobody reads this", file=sys.stderr)
        return 1 if sys.stderr.isatty() else 0

    assert run_command(command, [], "") == 0
    assert shown.getvalue() == b"\\u65e5\\u672c\n"


@pytest.mark.parametrize("name", ALLOCATOR)
def test_segments_of_a_gpus_memory_can_grow_unless_the_user_says_otherwise(name, monkeypatch):
    for other in ALLOCATOR:
        monkeypatch.delenv(other, raising=False)
    assert run_command(lambda _: 0, [], "") == 0
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    monkeypatch.setenv(name, "max_split_size_mb:512")
    assert run_command(lambda _: 0, [], "") == 0
    assert [os.environ.get(n) for n in ALLOCATOR].count(None) == 2


def test_memory_that_ran_out_is_a_message(capsys):
    def huge(_):
        torch.empty(2**50)

    assert run_command(huge, [], "") == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: memory ran out: make the model or data.sequence_length small")
    assert len(printed.splitlines()) == 1


def test_a_path_without_permission_is_the_users_to_change(capsys):
    def command(arguments):
        raise PermissionError(errno.EACCES, "Permission denied", "/given")

    assert run_command(command, [], "") == 2
    assert capsys.readouterr().err == "error: /given: Permission denied\n"


def test_a_working_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["train.steps=0"]) == 2
    assert "error: the working folder is gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(plan, ["plan.sweep=[64]", "plan.dir=file/x"]), (bench, ["+bench=step", "bench.dir=file/x"])],
)
def test_where_results_go_is_asked_before_the_work(
    command, arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mst_train.plan.predict.predict", None)
    monkeypatch.setattr("mst_train.bench.step.run", None)
    (tmp_path / "file").touch()
    assert command.main(arguments) == 2
    printed = capsys.readouterr().err
    assert f"{arguments[-1]} cannot be written (Not a directory): name another" in printed
