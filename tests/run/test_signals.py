"""SIGTERM and SIGUSR1 cost nothing: the step is finished, saved, and the same losses follow."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import mst_train.checkpoint.writer as checkpoint_writer
import mst_train.run.train as training
from mst_train.checkpoint.writer import CheckpointWriter
from mst_train.cli.command import run_command
from mst_train.cli.signals import STOP_SIGNALS, StopSignals
from mst_train.data import Loader
from mst_train.distributed import Topology
from mst_train.errors import Stopped
from mst_train.evaluate import validation
from mst_train.run.train import train


def records(config):
    lines = Path(config.run.dir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(config):
    return {r["step"]: r["loss"] for r in records(config) if "loss" in r}


def send(name):
    os.kill(os.getpid(), name)


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = [signal.getsignal(name) for name in STOP_SIGNALS]
    yield
    assert [signal.getsignal(name) for name in STOP_SIGNALS] == before


def in_a_step(patch, config, name):
    step = training.train_step

    def interrupted(*arguments):
        if len(losses(config)) == 2:
            send(name)
        return step(*arguments)

    patch.setattr(training, "train_step", interrupted)


def in_a_validation(patch, config, name):
    evaluate = validation.evaluate

    def interrupted(*arguments):
        if len(losses(config)) == 3:
            send(name)
        return evaluate(*arguments)

    patch.setattr(validation, "evaluate", interrupted)


def in_a_checkpoint(patch, config, name):
    write, save = checkpoint_writer.save_checkpoint, CheckpointWriter.save
    begun = threading.Event()

    def interrupted(*arguments):
        send(name)
        begun.set()
        time.sleep(0.2)
        return write(*arguments)

    def until_it_has_begun(writer, step, state):
        save(writer, step, state)
        begun.wait(300)

    patch.setattr(checkpoint_writer, "save_checkpoint", interrupted)
    patch.setattr(CheckpointWriter, "save", until_it_has_begun)


def in_a_wait_for_data(patch, config, name):
    """Data that do not come at all: nothing is waited for."""
    read, gone = Loader._batch, threading.Event()

    def hanging(loader, position):
        if position == 3:
            threading.Timer(0.3, send, (name,)).start()
            gone.wait(300)
        return read(loader, position)

    patch.setattr(Loader, "_batch", hanging)
    return gone


@pytest.mark.parametrize(
    ("interrupt", "background"),
    [
        (in_a_step, True),
        pytest.param(in_a_step, False, marks=pytest.mark.slow),
        (in_a_validation, True),
        (in_a_checkpoint, True),
        pytest.param(in_a_checkpoint, False, marks=pytest.mark.slow),
        (in_a_wait_for_data, True),
    ],
)
def test_a_signal_saves_the_last_finished_step(small_config, change, interrupt, background):
    settings = {"checkpoint.every": 5, "checkpoint.background": background}
    if interrupt is in_a_checkpoint:
        settings["checkpoint.every"] = 3
    whole = change(small_config, **settings)
    train(whole)
    cut = change(whole, **{"run.dir": small_config.run.dir + "_cut"})
    name = signal.SIGUSR1 if interrupt is in_a_step else signal.SIGTERM
    with pytest.MonkeyPatch.context() as patch:
        hanging = interrupt(patch, cut, name)
        try:
            with pytest.raises(Stopped, match=rf"{name.name} came, and everything up") as stopped:
                train(cut)
        finally:
            if hanging is not None:
                hanging.set()
    assert stopped.value.status == 128 + name
    last = max(losses(cut))
    # Where another thread sends the signal, a step more or less depends on its speed.
    possible = {in_a_checkpoint: (3, 4), in_a_wait_for_data: (1, 2, 3)}
    assert last in possible.get(interrupt, (3,))
    folder = Path(cut.run.dir)
    assert (folder / "checkpoints/latest").read_text().strip() == f"step_{last:08d}"
    assert records(cut)[-1] == {"step": last, "stopped": name.name}
    assert json.loads((folder / "summary.json").read_text())["stopped"] == name.name
    summary = train(cut)
    assert losses(cut) == losses(whole)
    assert "stopped" not in summary
    assert "stopped" not in json.loads((folder / "summary.json").read_text())


def test_a_signal_before_the_first_step_has_nothing_to_save(small_config, monkeypatch):
    evaluate = validation.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(validation, "evaluate", lambda *a: send(signal.SIGTERM) or evaluate(*a))
        with pytest.raises(Stopped, match="up to step 0 of 6"):
            train(small_config)
    assert not Path(small_config.run.dir, "checkpoints").exists()
    train(small_config)
    assert len(losses(small_config)) == 6


def test_a_signal_in_the_last_step_does_not_stop_a_run_that_is_done(small_config, monkeypatch):
    step = training.train_step

    def interrupted(*arguments):
        if len(losses(small_config)) == 5:
            send(signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(training, "train_step", interrupted)
    assert train(small_config)["step"] == 6


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal, time\n"
        "from mst_train.cli.signals import StopSignals\n"
        "stop = StopSignals()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "assert stop.received is signal.SIGUSR1\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == -signal.SIGTERM
    assert result.stderr == "SIGUSR1: finishing the step and saving (a second one ends at once)\n"


def test_a_second_interrupt_ends_the_process_at_once():
    """While the first one is leaving, with a thread that is still writing a checkpoint."""
    code = (
        "import os, signal, threading, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "from mst_train.cli.command import run_command\n"
        "def command(arguments):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('leaving', flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        threading.Event().wait(60)\n"
        "run_command(command, [], '')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (-signal.SIGINT, "leaving\n")
    assert result.stderr == ""


def test_one_interrupt_is_a_message(capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background

    def command(arguments):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    try:
        assert run_command(command, [], "the same command continues") == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert capsys.readouterr().err == "interrupted: the same command continues\n"
    assert run_command(lambda arguments: 0, [], "") == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_outside_the_main_thread_there_are_no_handlers(small_config):
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run():
        stop = StopSignals()
        seen.append((signal.getsignal(signal.SIGTERM), stop.received))
        stop.restore()
        seen.append(train(small_config)["step"])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, None), 6]


def test_the_command_leaves_with_the_signals_status(capsys):
    def command(arguments):
        raise Stopped("it came", signal.SIGTERM)

    assert run_command(command, [], "") == 143
    assert capsys.readouterr().err == "stopped: it came\n"


@pytest.mark.slow
def test_the_command_is_requeued(tmp_path, corpus, cache, small_config):
    """As a scheduler does it: a signal, status 138, the same command again."""
    command = [
        *(sys.executable, "-m", "mst_train", "run.dir=run", "train.steps=200000"),
        *(f"data.source={corpus}", f"data.cache_dir={cache}", "data.sequence_length=64"),
        *("data.tokenizer_vocab_size=512", "model.vocab_size=512", "model.hidden_size=32"),
        *("model.intermediate_size=88", "model.num_layers=2", "logging=wandb_disabled"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    metrics = tmp_path / "run/metrics.jsonl"
    steps = 5
    for start in ("SIGUSR1", "continuing from run/checkpoints/step_"):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 600
        while not metrics.exists() or metrics.read_text().count('"loss"') < steps:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        _, messages = process.communicate(timeout=600)
        assert process.returncode == 138
        assert start in messages and "stopped: SIGUSR1 came" in messages
        assert "Traceback" not in messages
        done = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert done[-1] == {"step": done[-2]["step"], "stopped": "SIGUSR1"}
        assert [r["step"] for r in done if "loss" in r] == list(range(1, done[-1]["step"] + 1))
        steps = done[-1]["step"] + 5


def test_processes_connect_before_signals_wait_for_them(small_config, monkeypatch):
    """Connecting to one that has gone is a wait in torch, which no handler of Python's cuts off."""
    before = [signal.getsignal(name) for name in STOP_SIGNALS]
    connect, handlers = Topology.with_timeout, []

    def connecting(topology, longest):
        handlers.append([signal.getsignal(name) for name in STOP_SIGNALS])
        return connect(topology, longest)

    monkeypatch.setattr(Topology, "with_timeout", connecting)
    train(small_config)
    assert handlers == [before] * 2
