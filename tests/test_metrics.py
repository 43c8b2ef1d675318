"""Records on disk, W&B offline, and life without W&B."""

import importlib.util
import json
import time

import pytest

from mst_train.errors import UserError
from mst_train.metrics import Metrics, Progress

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


@pytest.fixture
def wandb_config(small_config, change, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return change(small_config, **{"logging.wandb.mode": "offline"})


def wandb_messages(file):
    """The messages of an offline run's file: LevelDB's log format behind a header of 7 bytes."""
    data, block, message = file.read_bytes(), 32768, b""
    position = 7
    while position + 7 <= len(data):
        room = block - position % block
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]  # 1 whole, 2 first part, 3 middle, 4 last; 0 padding
        if room < 7 or kind == 0:
            position += room
            continue
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield message
            message = b""


def read_wandb(file):
    """(settings, history) of an offline run's file."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # W&B's own process may still be writing
        if any(Record.FromString(m).HasField("exit") for m in wandb_messages(file)):
            break
        time.sleep(0.1)
    settings, history = {}, []
    for message in wandb_messages(file):
        record = Record.FromString(message)
        for update in record.run.config.update:
            settings[update.key] = json.loads(update.value_json)
        if record.HasField("history"):
            items = record.history.item
            history.append(
                {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            )
    return settings, history


def test_wandb_offline_keeps_its_run_across_restarts(path, wandb_config):
    pytest.importorskip("wandb")
    for start in (0, 1):
        metrics = Metrics(path, wandb_config, start)
        metrics.log({**RECORD, "step": start + 1})
        metrics.close(0)
    identity = (path.parent / "wandb_run_id").read_text().strip()
    files = sorted(path.parent.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    steps = set()
    for file in files:
        settings, history = read_wandb(file)
        assert settings["train"]["steps"] == wandb_config.train.steps
        assert [h["loss"] for h in history] == [RECORD["loss"]]
        steps.add(history[0]["_step"])
    assert steps == {1, 2}


def without_wandb(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name)
    )


def test_without_wandb_the_records_are_written_all_the_same(path, wandb_config, monkeypatch):
    without_wandb(monkeypatch)
    metrics = Metrics(path, wandb_config, 0)
    metrics.log(RECORD)
    metrics.finish(RECORD)
    metrics.close(0)
    assert read(path) == [RECORD]
    assert not (path.parent / "wandb").exists()


def test_online_without_wandb_is_refused(path, wandb_config, change, monkeypatch):
    without_wandb(monkeypatch)
    config = change(wandb_config, **{"logging.wandb.mode": "online"})
    with pytest.raises(UserError, match=r"logging\.wandb\.mode=online, but wandb is not installed"):
        Metrics(path, config, 0)


def test_off_a_terminal_progress_is_some_lines(capsys):
    progress = Progress(0, 100)
    for step in range(1, 101):
        progress.update({**RECORD, "step": step})
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "step 100/100: loss 0.3000, 10 tokens/s, peak 1.00 GiB"
