"""A run's part in W&B, read back from the files that are written offline."""

import importlib.util
import io
import json
import logging
import runpy
import time
from pathlib import Path

import pytest

from mst_train.tracking.metrics import Metrics
from mst_train.tracking.names import NAMES, grouped
from mst_train.tracking.wandb_run import START_SECONDS, WandbRun
from mst_train.units import GIB

RECORD = {
    "step": 1,
    "loss": 0.1 + 0.2,
    "tokens_per_second": 10.0,
    "model_flops_utilization": None,
    "peak_memory_bytes": 2**29,
}
DASHBOARD = Path(__file__).parents[2] / "launch/wandb_dashboard.py"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def config(small_config, change, monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    return change(small_config, **{"logging.wandb.mode": "offline"})


def messages(file):
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


def read(file):
    """What an offline run's file holds: settings, history, summary, metrics, artifacts."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:  # W&B's own process may still be writing
        if any(Record.FromString(m).HasField("exit") for m in messages(file)):
            break
        time.sleep(0.1)
    found = {"settings": {}, "history": [], "summary": {}, "steps": {}, "artifacts": []}
    for message in messages(file):
        record = Record.FromString(message)
        for update in record.run.config.update:
            found["settings"][update.key] = json.loads(update.value_json)
        if record.HasField("history"):
            found["history"].append(_items(record.history.item))
        if record.HasField("summary"):
            found["summary"] |= _items(record.summary.update)
        if record.HasField("metric"):
            metric = record.metric
            found["steps"][metric.name or metric.glob_name] = metric.step_metric
        if record.HasField("artifact"):
            found["artifacts"].append(record.artifact)
        if record.HasField("request") and record.request.HasField("log_artifact"):
            found["artifacts"].append(record.request.log_artifact.artifact)
    return found


def _items(items):
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


def only_file(folder):
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return file


def test_names_are_grouped_and_sizes_in_gib():
    record = {
        **RECORD,
        "val_loss_books": 4.0,
        "val_loss_by_position": {"0": 3.0, "256": 2.5, "16384": 2.0},
        "passkey": [{"length": 4096, "depth": 0.5, "accuracy": 0.75, "loss": 1.0}],
        "vt": [{"length": 4096, "accuracy": 0.5, "exact": 0.25, "loss": 1.0}],
        "vt_exact": 0.25,
        "vt_chance": 0.01,
        "expert_load": [0.25, 0.75],
        "skipped": "the loss is nan",
    }
    assert grouped(record) == {
        "train/loss": RECORD["loss"],
        "speed/tokens_per_second": 10.0,
        "memory/peak_gib": 0.5,
        "val/loss_books": 4.0,
        "val_loss/position_0000": 3.0,
        "val_loss/position_0256": 2.5,
        "val_loss/position_16384": 2.0,
        "passkey/accuracy_4096_depth_050": 0.75,
        "vt/accuracy_4096": 0.5,
        "vt/exact": 0.25,
        "experts/load_000": 0.25,
        "experts/load_001": 0.75,
        "experts/most_used": 1.5,
        "experts/least_used": 0.5,
    }
    assert grouped({"step": 2, "new_number": 3}) == {"train/new_number": 3}


def test_offline_files_hold_settings_history_and_summary(path, config, caplog):
    pytest.importorskip("wandb")
    caplog.set_level(logging.INFO, "mst_train")
    metrics = Metrics(path, config, 0)
    metrics.predicted({"parameters": 3 * GIB, "head": GIB // 2})
    metrics.log({"step": 0, "val_loss": 5.0, "val_loss_by_position": {"0": 5.5, "256": 4.5}})
    metrics.log(RECORD)
    metrics.finish({**RECORD, "run_dir": "anywhere"})
    metrics.close(0)
    file = only_file(path.parent)
    assert f"wandb sync {file.parent}" in caplog.text
    found = read(file)
    assert found["settings"]["train"]["steps"] == config.train.steps
    assert found["settings"]["data"]["sequence_length"] == config.data.sequence_length
    before, after = found["history"]
    assert before["val/loss"] == 5.0
    assert before["val_loss/position_0256"] == 4.5
    assert before["step"] == before["_step"] == 0
    assert after["train/loss"] == RECORD["loss"]
    assert after["memory/peak_gib"] == 0.5
    assert after["step"] == after["_step"] == 1
    assert found["steps"]["*"] == "step"
    assert found["summary"]["memory/predicted/parameters"] == 3.0
    assert found["summary"]["train/loss"] == RECORD["loss"]
    assert found["artifacts"] == []


def test_a_run_that_continues_is_the_same_run(path, config):
    pytest.importorskip("wandb")
    for start in (0, 1):
        metrics = Metrics(path, config, start)
        metrics.log({**RECORD, "step": start + 1})
        metrics.close(0)
    identity = (path.parent / "wandb_run_id").read_text().strip()
    files = sorted(path.parent.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    assert {read(file)["history"][0]["_step"] for file in files} == {1, 2}


def write_checkpoint(folder, step):
    from mst_train.checkpoint.files import save_checkpoint

    save_checkpoint(folder / "checkpoints", step, {"trainer": {"step": step}}, keep=2)


@pytest.mark.parametrize(
    ("artifacts", "expected"),
    [
        ("last", [["latest", "step_00000004"]]),
        ("all", [["latest", f"step_0000000{n}"] for n in (2, 3, 4)]),
    ],
)
def test_checkpoints_by_choice(path, config, change, artifacts, expected):
    pytest.importorskip("wandb")
    write_checkpoint(path.parent, 1)  # of an earlier part of the run
    config = change(config, **{"logging.wandb.artifacts": artifacts})
    metrics = Metrics(path, config, 0)
    for step in (2, 3, 4):
        metrics.checkpoints()
        write_checkpoint(path.parent, step)
        metrics.log({**RECORD, "step": step})
    metrics.close(0)
    sent = read(only_file(path.parent))["artifacts"]
    assert [sorted(artifact.aliases) for artifact in sent] == expected
    assert all(artifact.type == "model" for artifact in sent)
    files = {entry.path for entry in sent[-1].manifest.contents}
    assert files == {"trainer.pt", "COMPLETE"}


def test_a_run_goes_on_where_wandb_fails(path, config, monkeypatch, caplog):
    pytest.importorskip("wandb")
    metrics = Metrics(path, config, 0)
    metrics.log(RECORD)

    def broken(self, record):
        raise ConnectionError("its process has gone")

    with monkeypatch.context() as patch:
        patch.setattr(WandbRun, "log", broken)
        metrics.log({**RECORD, "step": 2})
    metrics.log({**RECORD, "step": 3})
    metrics.finish(RECORD)
    metrics.close(0)
    assert caplog.text.count("W&B fails (its process has gone): the run goes on without it") == 1
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.fixture
def without_wandb(monkeypatch):
    find = importlib.util.find_spec
    missing = ("wandb", "wandb_workspaces")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name)
    )


def test_without_wandb_the_records_are_written_all_the_same(path, config, without_wandb):
    metrics = Metrics(path, config, 0)
    metrics.log(RECORD)
    metrics.finish(RECORD)
    metrics.close(0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [RECORD]
    assert not (path.parent / "wandb").exists()


def test_online_without_wandb_is_told(path, config, change, without_wandb, caplog):
    config = change(config, **{"logging.wandb.mode": "online"})
    goes_on_without(path, config)
    assert "wandb is not installed" in only_warning(caplog)


def only_warning(caplog):
    ours = [record for record in caplog.records if record.name.startswith("mst_train")]
    (warning,) = [record.message for record in ours if record.levelname == "WARNING"]
    return warning


def goes_on_without(path, config):
    metrics = Metrics(path, config, None)
    metrics.log(RECORD)
    metrics.finish(RECORD)
    metrics.close(0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [RECORD]
    path.unlink()


def test_what_keeps_it_from_starting_never_ends_a_run(path, config, change, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb")
    errors = wandb.errors
    failures = [
        errors.UsageError("No API key configured"),
        errors.AuthenticationError("the key is not 40 characters long"),
        errors.CommError("Run initialization has timed out after 30.0 sec"),
        errors.Error("Assertion failed"),
        TimeoutError(),
        ConnectionRefusedError(111, "Connection refused"),
        OSError(28, "No space left on device"),
        PermissionError(13, "Permission denied", "wandb"),
        ImportError("cannot import name 'init'"),
        AttributeError("module 'wandb' has no attribute 'init'"),
    ]
    for failure in failures:
        for mode in ("online", "offline"):

            def fail(*, failure=failure, **settings):
                raise failure

            caplog.clear()
            monkeypatch.setattr(wandb, "init", fail)
            goes_on_without(path, change(config, **{"logging.wandb.mode": mode}))
            warning = only_warning(caplog)
            assert "the run goes on without it, with its records in" in warning
            assert (str(failure) or "TimeoutError") in warning


def test_where_it_cannot_start_online_it_is_offline(path, config, change, monkeypatch, caplog):
    """Without a key: W&B itself, to its end."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    config = change(config, **{"logging.wandb.mode": "online"})
    metrics = Metrics(path, config, 0)
    metrics.log(RECORD)
    metrics.close(0)
    file = only_file(path.parent)
    warning = only_warning(caplog)
    assert "No API key configured" in warning
    assert f"wandb sync {file.parent}." in warning
    assert read(file)["history"][0]["train/loss"] == RECORD["loss"]


def test_a_server_out_of_reach_is_not_waited_for_long(path, config, change, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_INIT_TIMEOUT", raising=False)
    waits = []

    def fail(*, settings, mode, **others):
        given = settings.model_dump(include=settings.model_fields_set)
        waits.append((mode, given.get("init_timeout"), given["login_timeout"]))
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", fail)
    config = change(config, **{"logging.wandb.mode": "online"})
    goes_on_without(path, config)
    assert waits == [(mode, START_SECONDS, START_SECONDS) for mode in ("online", "offline")]
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "200")
    goes_on_without(path, config)
    assert waits[-1] == ("offline", None, START_SECONDS)  # W&B reads its own


@pytest.mark.parametrize("kept", ["", "\n", "a/b", "\udcff\0"])
def test_a_damaged_name_is_replaced(kept, path, config, caplog):
    pytest.importorskip("wandb")
    identity = path.parent / "wandb_run_id"
    identity.write_text(kept, errors="surrogateescape")
    metrics = Metrics(path, config, 0)
    metrics.log(RECORD)
    metrics.close(0)
    assert f"{identity} is damaged" in caplog.text
    assert only_file(path.parent).name == f"run-{identity.read_text()}.wandb"


def test_a_name_that_cannot_be_written_leaves_nothing(path, config, monkeypatch, caplog):
    """As on a full disk: after room was made, the next start finds no empty file."""
    pytest.importorskip("wandb")
    replace = Path.replace

    def full(self, target):
        if "wandb_run_id" not in self.name:
            return replace(self, target)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        goes_on_without(path, config)
    identity = path.parent / "wandb_run_id"
    assert f"No space left on device: '{identity}'" in caplog.text
    assert not list(path.parent.glob("wandb_run_id*"))
    metrics = Metrics(path, config, 0)
    metrics.log(RECORD)
    metrics.close(0)
    assert only_file(path.parent).name == f"run-{identity.read_text()}.wandb"


def test_the_dashboard_shows_metrics_that_runs_have():
    dashboard = runpy.run_path(str(DASHBOARD))
    shown = {metric for metrics in dashboard["SECTIONS"].values() for metric in metrics}
    assert shown == set(NAMES.values())


def test_the_dashboard_needs_its_library(without_wandb, capsys):
    dashboard = runpy.run_path(str(DASHBOARD))
    assert dashboard["main"](["someone"]) == 1
    assert "wandb-workspaces is not installed: pip install" in capsys.readouterr().err
    assert dashboard["main"]([]) == 2


def test_the_dashboard_is_one_that_wandb_takes():
    pytest.importorskip("wandb_workspaces")
    view = runpy.run_path(str(DASHBOARD))["workspace"]("someone", "a project")
    text = view._to_model().model_dump_json()
    for metric in (*NAMES.values(), "memory/predicted/head", "val_loss/position_"):
        assert metric in text
