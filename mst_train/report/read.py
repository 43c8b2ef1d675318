"""A run's folder, as its report needs it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from mst_train.errors import UserError

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run has written; parts that are not there are empty.

    training, validation, passkeys: the records of each kind, by step.
    """

    folder: Path
    training: list[Record]
    validation: list[Record]
    passkeys: list[Record]
    settings: dict[str, Any]
    environment: dict[str, Any]
    prediction: dict[str, Any]

    @property
    def name(self) -> str:
        name: str = self.settings.get("run", {}).get("name", self.folder.name)
        return name

    @property
    def sequence_length(self) -> int | None:
        length: int | None = self.settings.get("data", {}).get("sequence_length")
        return length

    def curve(self, key: str, scale: float = 1) -> tuple[list[int], list[float]]:
        """The steps and values of a number in the training records, where it is known."""
        return curve(self.training, key, scale)

    def last(self, key: str) -> float | None:
        """The last known value of a number in the training or validation records."""
        for records in (self.training, self.validation):
            values = curve(records, key)[1]
            if values:
                return values[-1]
        return None

    def median(self, key: str) -> float | None:
        """The median of a number in the training records."""
        values = self.curve(key)[1]
        return median(values) if values else None

    @property
    def seconds(self) -> float:
        """Spent in training steps."""
        return sum(self.curve("step_seconds")[1])


def curve(records: list[Record], key: str, scale: float = 1) -> tuple[list[int], list[float]]:
    """The steps and finite values of ``key``, divided by ``scale``."""
    known = [(r["step"], r[key] / scale) for r in records if _is_number(r.get(key))]
    return [step for step, _ in known], [value for _, value in known]


def read_run(folder: Path) -> Run:
    """The run in ``folder``; UserError where it holds none, or none that has done a step."""
    records = _records(folder)
    training = [r for r in records if "tokens" in r]
    if not training:
        raise UserError(f"{folder}/metrics.jsonl holds no training step yet: let the run do one")
    return Run(
        folder,
        training,
        [r for r in records if "val_loss" in r],
        [r for r in records if "passkey" in r],
        _read_yaml(folder / "config.yaml"),
        _read_json(folder / "environment.json"),
        _read_json(folder / "prediction.json"),
    )


def _records(folder: Path) -> list[Record]:
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(
            f"{folder} holds no metrics.jsonl: give the folder of a run (run.dir=DIR, "
            f"report.compare=[DIR,...])"
        ) from error
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # a last line that is being written
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
