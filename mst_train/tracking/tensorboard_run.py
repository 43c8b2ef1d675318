"""The run's numbers as TensorBoard reads them, in tensorboard/ in the run's folder."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mst_train.config import Config
from mst_train.errors import UserError
from mst_train.tracking.names import grouped
from mst_train.units import GIB


class TensorBoardRun:
    """Events of this process's part of a run; those of steps that are done again are left out."""

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int | None) -> None:
        """step: the last one that counts of what is there; None: a fresh start."""
        from torch.utils.tensorboard import SummaryWriter

        purge = None if step is None else step + 1
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write a record's numbers; it has a ``step``."""
        self._write(grouped(record), record["step"])

    def predicted(self, breakdown: Mapping[str, int]) -> None:
        """Write the planner's breakdown of the peak (bytes by kind)."""
        self._write({f"memory/predicted/{kind}": size / GIB for kind, size in breakdown.items()}, 0)

    def checkpoints(self) -> None:
        """Nothing of them goes there."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """All numbers are there already."""

    def close(self, exit_code: int) -> None:
        """Write what is not written yet."""
        self._writer.close()

    def _write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


def check_tensorboard(config: Config) -> None:
    """Raises UserError where TensorBoard is asked for and not installed."""
    if config.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("logging.tensorboard=true needs a package: pip install tensorboard")
