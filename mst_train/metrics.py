"""What a run reports: metrics.jsonl, summary.json, W&B and the terminal."""

import contextlib
import importlib.util
import json
import logging
import sys
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mst_train.config import Config
from mst_train.errors import UserError

GIB = 2**30

log = logging.getLogger(__name__)


class Metrics:
    """The records of a run, appended to a file and sent to W&B.

    A run that continues after ``step`` drops the records of later steps first: they belong to work
    that was lost and is about to be done again. A fresh start (None) sets a file that is there
    already aside.
    """

    def __init__(self, path: Path, config: Config, step: int | None) -> None:
        self._path = path
        if step is None:
            _set_aside(path)
        else:
            _drop_after(path, step)
        self._file = path.open("a")
        self._wandb = _start_wandb(path.parent, config)

    def log(self, record: dict[str, Any]) -> None:
        """Append one record; it has a ``step``."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._wandb is not None:
            values = {key: v for key, v in record.items() if key != "step" and v is not None}
            self._wandb.log(values, step=record["step"])

    def finish(self, summary: dict[str, Any]) -> None:
        """Send the summary to W&B."""
        if self._wandb is not None:
            self._wandb.summary.update(summary)

    def close(self, exit_code: int) -> None:
        """Close the file and W&B's run."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)


class Progress:
    """A progress bar on a terminal, and a line now and then elsewhere."""

    def __init__(self, step: int, steps: int) -> None:
        self._steps = steps
        self._every = min(max(steps // 20, 1), 100)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps, initial=step, unit="step", disable=not self._terminal, dynamic_ncols=True
        )

    def update(self, record: dict[str, Any]) -> None:
        """Show a training step's record."""
        shown = (
            f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s, "
            f"peak {record['peak_memory_bytes'] / GIB:.2f} GiB"
        )
        with contextlib.suppress(OSError):  # a terminal that has gone does not stop the run
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update()
        step = record["step"]
        if not self._terminal and (step == 1 or step % self._every == 0 or step == self._steps):
            self.say(f"step {step}/{self._steps}: {shown}")

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        with contextlib.suppress(OSError):
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        self._bar.close()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def _set_aside(path: Path) -> None:
    """Rename the records of an attempt that left no checkpoint."""
    if path.exists() and path.stat().st_size:
        aside = path.with_name(f"{path.name}.before")
        path.replace(aside)
        log.warning("there is no checkpoint to continue from: earlier records are in %s", aside)


def _drop_after(path: Path, step: int) -> None:
    """Rewrite the records without those after ``step`` and without a last line cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            log.warning("dropping a line of %s that is not a record: %.60s", path, line)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def _start_wandb(folder: Path, config: Config) -> Any:
    settings = config.logging.wandb
    if settings.mode == "disabled":
        return None
    if importlib.util.find_spec("wandb") is None:
        if settings.mode == "online":
            raise UserError(
                "logging.wandb.mode=online, but wandb is not installed: pip install wandb, or set "
                "logging.wandb.mode=disabled"
            )
        log.info("wandb is not installed: metrics go to %s alone", folder / "metrics.jsonl")
        return None
    import wandb

    identity = folder / "wandb_run_id"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:8])
    return wandb.init(
        id=identity.read_text().strip(),
        resume="allow",
        mode=settings.mode,  # type: ignore[arg-type]
        project=settings.project,
        name=config.run.name,
        dir=folder,
        config=asdict(config),
        settings=wandb.Settings(silent=settings.mode == "offline"),
    )
