"""A run's folder, as its report needs it. What is damaged is left out, and a warning says so."""

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from mst_train.config import ALL, TASKS, KeepConfig
from mst_train.errors import UserError
from mst_train.memory.tracker import KINDS

Record = dict[str, Any]

LARGEST = 1e100
"""Larger numbers cannot be drawn; nothing that a run measures comes near."""
PLACES = 100_000
"""The most values in a file of settings; a YAML of a few lines can stand for billions."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a run has written; parts that are not there are empty.

    training, validation: the records of each kind, by step; tasks: those of each task.
    """

    folder: Path
    name: str
    training: list[Record]
    validation: list[Record]
    tasks: dict[str, list[Record]]
    settings: dict[str, Any]
    environment: dict[str, Any]
    prediction: dict[str, Any]

    @property
    def sequence_length(self) -> int | None:
        return group(self.settings, "data").get("sequence_length")

    def last(self, key: str) -> float | None:
        """The last known value of a number in the training or validation records."""
        for records in (self.training, self.validation):
            values = curve(records, key)[1]
            if values:
                return values[-1]
        return None

    def median(self, key: str) -> float | None:
        """The median of a number in the training records."""
        values = curve(self.training, key)[1]
        return median(values) if values else None

    @property
    def seconds(self) -> float:
        """Spent in training steps."""
        return sum(curve(self.training, "step_seconds")[1])

    @property
    def passkey_accuracy(self) -> float | None:
        """Of the last retrieval; None where there was none."""
        found = self.tasks.get("passkey")
        return found[-1]["passkey_accuracy"] if found else None


def curve(records: list[Record], key: str, scale: float = 1) -> tuple[list[int], list[float]]:
    """The steps and finite values of ``key``, divided by ``scale``."""
    known = [(r["step"], r[key] / scale) for r in records if _is_number(r.get(key))]
    return [step for step, _ in known], [value for _, value in known]


def expert_use(records: list[Record]) -> tuple[list[int], list[float], list[float]]:
    """The steps that say how much experts were used, and of each the most and the least used
    one's share; 1 is an even one."""
    known = [(r["step"], r["expert_load"]) for r in records if "expert_load" in r]
    most, least = ([len(load) * pick(load) for _, load in known] for pick in (max, min))
    return [step for step, _ in known], most, least


def group(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """A group of settings; an empty one where there is none. ValueError for a single value."""
    found = settings.get(name)
    if found is None:
        return {}
    _require(isinstance(found, dict), f"{name} is no group")
    return found


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in ``folders``, each with a name that no other has: else, that of its folder."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    above = os.path.commonpath([folder.absolute().parent for folder in folders])
    return [
        replace(run, name=os.path.relpath(run.folder, above)) if names.count(run.name) > 1 else run
        for run in runs
    ]


def read_run(folder: Path) -> Run:
    """The run in ``folder``; UserError where it holds none, or none that has done a step."""
    records = _records(folder / "metrics.jsonl")
    training = [r for r in records if "tokens" in r]
    if not training:
        raise UserError(f"{folder}/metrics.jsonl holds no training step yet: let the run do one")
    settings = _read(folder / "config.yaml", yaml.safe_load, _check_settings)
    return Run(
        folder,
        group(settings, "run").get("name", folder.name),
        training,
        [r for r in records if "val_loss" in r],
        {task: found for task in TASKS if (found := [r for r in records if task in r])},
        settings,
        _read(folder / "environment.json", json.loads, _check_environment),
        _read(folder / "prediction.json", json.loads, _check_prediction),
    )


def _records(path: Path) -> list[Record]:
    if not path.exists():
        around = path.parents[2] if len(path.parents) > 2 else path
        if (around / path.name).exists():
            raise UserError(f"{path.parent} is a part of a run: give the run's folder, {around}")
        raise UserError(
            f"{path.parent} holds no metrics.jsonl: give the folder of a run (run.dir=DIR, "
            f"report.compare=[DIR,...])"
        )
    try:
        text = _text_of(path, "replace")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_reason(error)}): make it readable") from error
    records, damaged = [], []
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            _check_record(record)
        except (ValueError, RecursionError) as error:
            if number < len(lines):  # the last one is empty, or being written
                damaged.append((number, _reason(error)))
        else:
            records.append(record)
    if damaged:
        number, reason = damaged[0]
        log.warning(
            "%s is damaged in %d lines (line %d: %s): the page is without them",
            *(path, len(damaged), number, reason),
        )
    return records


def _read(
    path: Path, parse: Callable[[str], Any], check: Callable[[Record], None]
) -> dict[str, Any]:
    """What a file says; nothing where it is not there or, with a warning, damaged."""
    if not path.exists():
        return {}
    try:
        content = parse(_text_of(path))
        _require(isinstance(content, dict), "it is no group of settings")
        _count(content, 0)
        check(content)
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        log.warning("%s is damaged (%s): the page is without it", path, _reason(error))
        return {}
    return content


def _text_of(path: Path, errors: str = "strict") -> str:
    _require(path.is_file(), "it is no file")
    return path.read_text("utf-8", errors)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{' '.join(str(error).split()) or type(error).__name__:.120}"


# --- what the page relies on; ValueError where a file does not have it ---------------------------


def _check_record(record: Any) -> None:
    _require(isinstance(record, dict), "it is no record")
    _require(_is_whole(record.get("step")), "step is no whole number")
    for key, value in record.items():
        if key == "val_loss_by_position":
            _require(isinstance(value, dict), f"{key} is no group of losses")
            places = all(at.isascii() and at.isdigit() and len(at) < 16 for at in value)
            _require(places and all(map(_is_number, value.values())), f"{key} is not by position")
        elif key in TASKS:
            _require(isinstance(value, list) and bool(value), f"{key} is no list of probes")
            _require(all(map(_is_probe, value)), f"{key} has a probe of another form")
            _require(len({"depth" in probe for probe in value}) == 1, f"{key} lacks a depth")
            _require(_is_share(record.get(f"{key}_accuracy")), f"{key}_accuracy is no share")
        elif key == "expert_load":
            shares = isinstance(value, list) and bool(value) and all(map(_is_share, value))
            _require(shares, f"{key} is no list of shares")
        elif key not in ("skipped", "stopped"):
            unknown = value is None or (isinstance(value, float) and not math.isfinite(value))
            _require(unknown or _is_number(value), f"{key} is no number that can be")


def _is_probe(probe: Any) -> bool:
    return (
        isinstance(probe, dict)
        and _is_whole(probe.get("length"))
        and _is_share(probe.get("depth", 0))
        and _is_share(probe.get("accuracy"))
    )


def _check_settings(content: Record) -> None:
    _check_text(content, "precision")
    _check_text(group(content, "run"), "name")
    for part, names in (("data", ["sequence_length"]), ("model", ["num_layers", "hidden_size"])):
        found = group(content, part)
        for name in names if found else ():
            _require(_is_size(found.get(name)), f"{part}.{name} is no whole number above 0")


def _check_environment(content: Record) -> None:
    for name in ("date", "tokenizer"):
        _check_text(content, name)
    group(content, "hardware")


def _check_prediction(content: Record) -> None:
    for name in ("sequence_length", "tokens_per_step", "gpus"):
        _require(_is_size(content.get(name)), f"{name} is no whole number")
    for name in ("device", "policy", "offload"):
        _require(isinstance(content.get(name), str), f"{name} is no text")
    _require(isinstance(content.get("in_backward"), bool), "in_backward is neither true nor false")
    keep = group(content, "keep")
    _require(
        keep.keys() <= {part.name for part in fields(KeepConfig)}
        and all(n == ALL or (_is_whole(n) and n >= 0) for n in keep.values()),
        "keep is not what blocks keep",
    )
    sizes = {name: content.get(name) for name in ("peak_bytes", "budget_bytes")}
    breakdown = group(content, "breakdown")
    sizes |= {kind: breakdown.get(kind) for kind in (*KINDS, "overhead")}
    for name, size in sizes.items():
        _require(size is not None and _is_number(size) and size >= 0, f"{name} is no size")


def _count(value: Any, seen: int) -> int:
    """``seen`` and the values in a tree of text, numbers and groups of them, which it has to be."""
    _require(seen < PLACES, f"it has more than {PLACES:,} values")
    if isinstance(value, dict):
        for name, inside in value.items():
            _require(isinstance(name, str), f"{name!r} is not the name of a setting")
            name.encode()
            seen = _count(inside, seen + 1)
    elif isinstance(value, list):
        for inside in value:
            seen = _count(inside, seen + 1)
    elif isinstance(value, str):
        value.encode()
    else:
        _require(value is None or isinstance(value, int | float), f"{value!r} is no setting")
    return seen


def _check_text(content: Record, name: str) -> None:
    _require(isinstance(content.get(name, ""), str), f"{name} is no text")


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < LARGEST and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _is_size(value: Any) -> bool:
    return _is_whole(value) and value > 0


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1
