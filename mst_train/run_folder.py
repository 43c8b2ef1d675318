"""A run's folder: who may write to it, and what a run that is already there means.

config.yaml       the resolved configuration
metrics.jsonl     one object per step
summary.json      the outcome, once the run has finished
checkpoints/      see checkpoint.py
wandb/            W&B's own files
"""

import fcntl
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import yaml

from mst_train.checkpoint import complete_checkpoints, find_checkpoint
from mst_train.config import AUTO, Config
from mst_train.errors import UserError

FIXED = (
    "precision",
    "model",
    "train.seed",
    "data.source",
    "data.sequence_length",
    "data.attention",
    "data.validation_fraction",
    "data.tokenizer",
    "data.tokenizer_vocab_size",
)
"""What a run's weights and its order of data depend on."""

log = logging.getLogger(__name__)


class RunFolder:
    """The folder of one run. Creating this object only looks; ``open`` writes.

    ``resume_from`` is the checkpoint to continue from (None: a fresh start). Raises UserError where
    the folder cannot be used with this configuration.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run.dir)
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run.dir={self.path} is a file: name a folder")
        self.resume_from = self._choose_checkpoint(config)
        self._config = config
        self._lock: TextIO | None = None

    def finished(self) -> dict[str, Any] | None:
        """The summary of the run that is here, if it has done all its steps already."""
        try:
            summary: dict[str, Any] = json.loads(self.summary.read_text())
        except (OSError, ValueError):
            return None
        return summary if summary.get("step", 0) >= self._config.train.steps else None

    def open(self) -> None:
        """Create the folder, take it for this process alone, and write config.yaml."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"run.dir={self.path} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise UserError(
                f"run.dir={self.path} is in use by another process: wait for it, or choose "
                f"another run.dir"
            ) from error
        settings = yaml.safe_dump(asdict(self._config), sort_keys=False)
        (self.path / "config.yaml").write_text(settings)

    def close(self) -> None:
        """Let another process use the folder."""
        if self._lock is not None:
            self._lock.close()

    def _choose_checkpoint(self, config: Config) -> Path | None:
        if config.run.resume == "never":
            if self.metrics.exists() or self.checkpoints.exists():
                raise UserError(
                    f"run.dir={self.path} holds a run already, and run.resume=never forbids to "
                    f"continue it: choose another run.dir or run.name, or set run.resume=auto"
                )
            return None
        if config.run.resume != AUTO:
            return find_checkpoint(Path(config.run.resume))
        complete = complete_checkpoints(self.checkpoints)
        return complete[-1] if complete else None


def check_continuation(before: dict[str, Any], config: Config, checkpoint: Path) -> None:
    """Compare the settings a checkpoint was made with to today's.

    Raises UserError for changes that would make it another run; warns of the others.
    """
    refused = []
    for key, new in _leaves(asdict(config)):
        old = _lookup(before, key)
        if old == new or key.startswith("run."):
            continue
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED):
            refused.append(
                f"{key}={new}, but {checkpoint} was made with {old}: put it back, or start anew "
                f"with another run.dir"
            )
        else:
            log.warning("%s is %s now and was %s at %s", key, new, old, checkpoint)
    if refused:
        raise UserError(refused)


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found


def _lookup(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree
