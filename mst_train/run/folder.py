"""A run's folder: who may write to it, and what a run that is already there means.

config.yaml       the resolved configuration
metrics.jsonl     one object per step
summary.json      the outcome, once the run has finished
environment.json  where it was started: command, commit, machine, versions
prediction.json   what its memory was predicted to hold
checkpoints/      see checkpoint/files.py
wandb/            W&B's own files
"""

import fcntl
import logging
import uuid
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import yaml

from mst_train.checkpoint.files import find_checkpoint, own_checkpoints
from mst_train.config import AUTO, Config, leaves, lookup
from mst_train.data.corpus import prepared_folder
from mst_train.errors import InUse, UserError
from mst_train.files import expanded, is_at, writing, writing_to

FIXED = (
    "precision",
    "model",
    "optimizer.name",
    "train.seed",
    "data.source",
    "data.mixture",
    "data.packing",
    "data.text_suffixes",
    "data.documents",
    "data.streaming",
    "data.text_field",
    "data.split",
    "data.sequence_length",
    "data.attention",
    "data.validation_fraction",
    "data.tokenizer",
    "data.tokenizer_vocab_size",
)
"""What a run's weights, its optimizer's states and its order of data depend on."""

SHAPE = ("precision", "model")
MAY_CHANGE = (
    "model.rope_theta",
    "model.rope_scaling",
    "model.max_positions",
    "model.balance_loss",
    "model.router_z_loss",
)
"""What a new run that starts from another's weights has to have as they had, and what of it not."""

log = logging.getLogger(__name__)


class RunFolder:
    """The folder of one run. Creating this object only looks; ``open`` writes.

    ``candidates`` are the checkpoints to continue from, the best first; none: a fresh start, from
    the weights of the checkpoint ``origin`` if there is one. Raises UserError where the folder
    cannot be used with this configuration.
    """

    def __init__(self, config: Config) -> None:
        self.path = expanded(config.run.dir)
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.environment = self.path / "environment.json"
        self.prediction = self.path / "prediction.json"
        self.config = config
        """What ``open`` writes."""
        self.lock = ""
        """What ``open`` has written into the lock file."""
        self._lock: TextIO | None = None
        for path in (self.path, self.checkpoints):
            if path.exists() and not path.is_dir():
                raise UserError(
                    f"{path} is a file where a folder is needed: choose another run.dir"
                )
        self.candidates = self._own = self._own_checkpoints()
        if not self._own and config.run.resume not in (AUTO, "never"):
            # Another run's, which may be going on.
            self.candidates = [find_checkpoint(expanded(config.run.resume))]
        self.origin: Path | None = None
        if not self.candidates and config.run.init_from is not None:
            self.origin = find_checkpoint(expanded(config.run.init_from), "run.init_from")

    def open(self) -> None:
        """Create the folder, take it for this process alone, and write config.yaml.

        Raises InUse where it is another's; UserError or TrainingError where it cannot be written.
        """
        with writing_to(f"run.dir={self.path}", "give permission there, or name another folder"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")  # what another has written stays
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise InUse(
                f"run.dir={self.path} is in use by another process: wait for it, or choose "
                f"another run.dir"
            ) from error
        except OSError as error:
            raise UserError(
                f"run.dir={self.path} cannot be locked ({error.strerror}), so two runs could write "
                f"to it at once: choose another file system for it"
            ) from error
        if not is_at(self._lock, self.path / ".lock") or self._own_checkpoints() != self._own:
            self.close()
            raise InUse(f"another process has just worked in run.dir={self.path}: start again")
        self.lock = uuid.uuid4().hex
        with writing(self.path / ".lock"):
            self._lock.truncate(0)
            self._lock.write(self.lock)
            self._lock.flush()
        settings = yaml.safe_dump(asdict(self.config), sort_keys=False)
        with writing(self.path / "config.yaml"):
            (self.path / "config.yaml").write_text(settings)

    def require_shared(self, lock: str) -> None:
        """Whether this is the folder in which another process has written its ``lock``.

        Raises UserError where it is not: on another machine, a folder of the same name.
        """
        try:
            found = (self.path / ".lock").read_text()
        except OSError:
            found = ""
        if found != lock:
            raise UserError(
                f"run.dir={self.path} is not the folder that the first process writes: set run.dir "
                f"to one on storage that all machines share"
            )

    def close(self) -> None:
        """Let another process use the folder."""
        if self._lock is not None:
            self._lock.close()

    def _own_checkpoints(self) -> list[Path]:
        if self.config.run.resume == "never" and (
            self.metrics.exists() or self.checkpoints.exists()
        ):
            raise UserError(
                f"run.dir={self.path} holds a run already, and run.resume=never forbids to "
                f"continue it: choose another run.dir or run.name, or set run.resume=auto"
            )
        return own_checkpoints(self.checkpoints)


def check_continuation(before: dict[str, Any], config: Config, checkpoint: Path) -> None:
    """Compare the settings a checkpoint was made with to today's.

    Raises UserError for changes that would make it another run; warns of the others.
    """
    refused = []
    for key, new in leaves(asdict(config)):
        old = _before(before, key)
        if old == new or key.startswith("run."):
            continue
        if key == "data.source" and lookup(before, "data.mixture"):
            continue  # which it has not read
        # A prepared folder may have moved: what it holds is compared when it is opened.
        moved = key == "data.source" and prepared_folder(new) is not None
        if _is_among(key, FIXED) and not moved:
            anew = "put it back, or start anew in another run.dir"
            if not _has_other_weights(key):
                anew += f" (run.init_from={checkpoint} takes its weights along)"
            refused.append(f"{key}={new}, but {checkpoint} was made with {old}: {anew}")
        else:
            log.warning("%s is %s now and was %s at %s", key, new, old, checkpoint)
    if refused:
        raise UserError(refused)


def check_beginning(before: dict[str, Any], config: Config, origin: Path) -> None:
    """Whether a new run can start with the weights of a checkpoint that had these settings.

    Raises UserError where its model is another, or its optimizer, whose states it is to take along.
    """
    refused = [
        f"{key}={new}, but run.init_from={origin} was made with {old}: its weights are for that "
        f"(+experiment with that run's folder takes over all of its settings)"
        for key, new in leaves(asdict(config))
        if _has_other_weights(key) and (old := _before(before, key)) != new
    ]
    name, old = config.optimizer.name, _before(before, "optimizer.name")
    if config.run.init_optimizer and name != old:
        refused.append(
            f"optimizer.name={name}, but run.init_from={origin} was made with {old} and its states "
            f"are of that: set run.init_optimizer=false to start them anew, or put it back"
        )
    if refused:
        raise UserError(refused)


def _has_other_weights(key: str) -> bool:
    """Whether another value of this setting means other weights."""
    return _is_among(key, SHAPE) and not _is_among(key, MAY_CHANGE)


def _before(before: dict[str, Any], key: str) -> Any:
    """A checkpoint's setting; its default where the checkpoint is from before there was one."""
    group, _, name = key.rpartition(".")
    holder = lookup(before, group) if group else before
    known = isinstance(holder, dict) and name in holder
    return lookup(before if known else asdict(Config()), key)


def _is_among(key: str, settings: Iterable[str]) -> bool:
    """Whether a setting is one of these, or in one of these groups."""
    return any(key == name or key.startswith(f"{name}.") for name in settings)
