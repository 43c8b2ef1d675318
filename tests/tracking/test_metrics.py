"""Records on disk and on the terminal."""

import json

import pytest

from mst_train.tracking.metrics import Metrics, Progress

RECORD = {
    "step": 1,
    "loss": 0.1 + 0.2,
    "tokens_per_second": 10.0,
    "model_flops_utilization": None,
    "peak_memory_bytes": 2**30,
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_keep_every_digit(path, small_config):
    metrics = Metrics(path, small_config, None)
    metrics.log(RECORD)
    metrics.close(0)
    assert read(path) == [RECORD]


def test_a_fresh_start_sets_earlier_records_aside(path, small_config, caplog):
    path.write_text(json.dumps(RECORD) + "\n")
    metrics = Metrics(path, small_config, None)
    metrics.log({**RECORD, "loss": 2.0})
    metrics.close(0)
    assert read(path) == [{**RECORD, "loss": 2.0}]
    assert read(path.with_name("metrics.jsonl.before")) == [RECORD]
    assert "no checkpoint to continue from" in caplog.text


def test_continuing_drops_what_came_after(path, small_config):
    metrics = Metrics(path, small_config, 0)
    for step in range(6):
        metrics.log({**RECORD, "step": step})
    metrics.close(1)
    with path.open("a") as file:
        file.write('{"step": 6, "loss"')
    metrics = Metrics(path, small_config, 3)
    metrics.log({**RECORD, "step": 4})
    metrics.close(0)
    assert [r["step"] for r in read(path)] == [0, 1, 2, 3, 4]


def test_a_wandb_that_fails_does_not_end_the_run(path, small_config, monkeypatch, caplog):
    class Failing:
        name = "W&B"

        def log(self, record):
            raise ConnectionResetError("Connection lost")

    monkeypatch.setattr("mst_train.tracking.metrics.start_wandb", lambda folder, config: Failing())
    metrics = Metrics(path, small_config, None)
    metrics.log(RECORD)
    metrics.log({**RECORD, "step": 2})
    metrics.finish(RECORD)
    metrics.close(0)
    assert [r["step"] for r in read(path)] == [1, 2]
    assert caplog.text.count("W&B fails (Connection lost): the run goes on without it") == 1


def test_off_a_terminal_progress_is_some_lines(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("mst_train.tracking.metrics.time.monotonic", lambda: now)
    progress = Progress(50, 150)
    for step in range(51, 151):
        now += 6
        progress.update({**RECORD, "step": step})
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 15
    shown = "loss 0.3000, 10 tokens/s, peak 1.00 GiB"
    assert lines[4] == f"step 84/150: {shown}, 3.4 min so far, 6.6 min left"
    assert lines[-1] == f"step 150/150: {shown}, 10.0 min so far"


def test_off_a_terminal_long_steps_are_told_each_minute(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("mst_train.tracking.metrics.time.monotonic", lambda: now)
    progress = Progress(100, 1100)
    for step in range(101, 110):
        now += 25
        progress.update({**RECORD, "step": step})
    progress.close()
    told = [line.partition("/")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ["step 103", "step 106", "step 109"]
