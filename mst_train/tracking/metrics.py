"""What a run reports: metrics.jsonl, W&B, TensorBoard and the terminal."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from mst_train.config import Config
from mst_train.errors import TrainingError
from mst_train.files import is_at, replace_text, writing
from mst_train.tracking.tensorboard_run import TensorBoardRun
from mst_train.tracking.wandb_run import WandbRun, start_wandb
from mst_train.units import GIB, duration

log = logging.getLogger(__name__)


class Metrics:
    """The records of a run, appended to a file and sent to W&B and TensorBoard.

    A run that continues after ``step`` drops the records of later steps first: they belong to work
    that was lost and is about to be done again. A fresh start (None) sets a file that is there
    already aside.

    Of several processes one ``writes``; for the others this is there and does nothing.
    """

    def __init__(
        self, path: Path, config: Config, step: int | None, *, writes: bool = True
    ) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._others: list[WandbRun | TensorBoardRun] = []
        if not writes:
            return
        with writing(path):
            if step is None:
                _set_aside(path)
            else:
                _drop_after(path, step)
            self._file = path.open("a")
        wandb = start_wandb(path.parent, config)
        self._others = [] if wandb is None else [wandb]
        if config.logging.tensorboard:
            self._others.append(TensorBoardRun(path.parent, step))

    def log(self, record: dict[str, Any]) -> None:
        """Append one record; it has a ``step``. Raises TrainingError where it cannot be written."""
        if self._file is None:
            return
        with writing(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        self._require_there()
        self._tell(lambda run: run.log(record))

    def predicted(self, breakdown: dict[str, int]) -> None:
        """Send the planner's breakdown of the peak (bytes by kind) to W&B and TensorBoard."""
        self._tell(lambda run: run.predicted(breakdown))

    def checkpoints(self) -> None:
        """Send new checkpoints to W&B, where logging.wandb.artifacts asks for all of them."""
        self._tell(lambda run: run.checkpoints())

    def finish(self, summary: dict[str, Any]) -> None:
        """Send the summary to W&B. Raises TrainingError where the records are gone by now."""
        self._require_there()
        self._tell(lambda run: run.finish(summary))

    def close(self, exit_code: int) -> None:
        """Close the file, and W&B's run and TensorBoard's."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a record that could not be written
                self._file.close()
        self._tell(lambda run: run.close(exit_code))

    def _require_there(self) -> None:
        """An open file takes records although nobody will find it where it was."""
        if self._file is not None and not is_at(self._file, self._path):
            raise TrainingError(
                f"{self._path} was removed, moved or replaced during the run: put it back where it "
                f"was, and the same command continues from the last checkpoint"
            )

    def _tell(self, tell: Callable[[WandbRun | TensorBoardRun], None]) -> None:
        """Nothing that goes wrong in these ends a run: it goes on without."""
        for run in list(self._others):
            try:
                tell(run)
            except Exception as error:  # whatever W&B, the network and the disk raise
                reason = str(error) or type(error).__name__
                log.warning(
                    "%s fails (%s): the run goes on without it, see %s",
                    run.name,
                    reason,
                    self._path,
                )
                self._others.remove(run)


SILENT_SECONDS = 60.0
"""So long nothing is said at most, where no single step takes longer."""


class Progress:
    """A progress bar on a terminal, and a line now and then elsewhere; nothing unless ``shown``."""

    def __init__(self, step: int, steps: int, *, shown: bool = True) -> None:
        self._first, self._steps = step, steps
        self._started = time.monotonic()
        self._shown = shown
        self._every = min(max(steps // 20, 1), 100)
        self._told = self._started
        self._terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(
            total=steps, initial=step, unit="step", disable=not self._terminal, dynamic_ncols=True
        )

    def update(self, record: dict[str, Any]) -> None:
        """Show a training step's record."""
        loss = f"loss {record['loss']:.4f}" if "loss" in record else "left out"
        shown = (
            f"{loss}, {record['tokens_per_second']:,.0f} tokens/s, "
            f"peak {record['peak_memory_bytes'] / GIB:.2f} GiB"
        )
        with contextlib.suppress(OSError):  # a terminal that has gone does not stop the run
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update()
        step, now = record["step"], time.monotonic()
        due = step in (1, self._steps) or step % self._every == 0
        if not self._terminal and (due or now - self._told >= SILENT_SECONDS):
            self._told = now
            elapsed = now - self._started
            left = elapsed / (step - self._first) * (self._steps - step)
            to_come = f", {duration(left)} left" if left else ""
            self.say(f"step {step}/{self._steps}: {shown}, {duration(elapsed)} so far{to_come}")

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        if not self._shown:
            return
        with contextlib.suppress(OSError):
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        self._bar.close()


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
    replace_text(path, "".join(kept))
