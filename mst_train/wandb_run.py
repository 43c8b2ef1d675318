"""A run in Weights & Biases: its metrics in groups, its settings, and its checkpoints by choice.

Offline, everything is written below the run's folder, and nothing is sent before ``wandb sync``.
"""

import importlib.util
import logging
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mst_train.checkpoint import complete_checkpoints
from mst_train.config import Config
from mst_train.errors import UserError

GIB = 2**30

NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens": "train/tokens",
    "val_loss": "val/loss",
    "tokens_per_second": "speed/tokens_per_second",
    "step_seconds": "speed/step_seconds",
    "model_flops_utilization": "speed/model_flops_utilization",
    "communication_share": "speed/communication_share",
    "peak_memory_bytes": "memory/peak_gib",
    "peak_memory_process": "memory/peak_process",
    "passkey_accuracy": "passkey/accuracy",
    "passkey_loss": "passkey/loss",
}
"""What a record's numbers are called in W&B; others are "train/" and their own name."""

log = logging.getLogger(__name__)


def grouped(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers as W&B gets them, by "group/name"; sizes in GiB."""
    values: dict[str, float] = {}
    for key, value in record.items():
        if key == "val_loss_by_position":
            values |= {f"val_loss/position_{int(at):04d}": loss for at, loss in value.items()}
        elif key == "passkey":
            for probe in value:
                place = f"{probe['length']}_depth_{100 * probe['depth']:03.0f}"
                values[f"passkey/accuracy_{place}"] = probe["accuracy"]
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            scale = GIB if key.endswith("_bytes") else 1
            values[NAMES.get(key, f"train/{key}")] = value / scale if scale != 1 else value
    return values


class WandbRun:
    """One process's part of a run; a run that continues is the same run in W&B."""

    def __init__(self, folder: Path, config: Config) -> None:
        """``folder``: the run's. Imports wandb, which has to be there."""
        import wandb

        self._wandb, self._settings = wandb, config.logging.wandb
        self._checkpoints = folder / "checkpoints"
        self._sent = set(self._complete()) if self._settings.artifacts == "all" else set()
        identity = folder / "wandb_run_id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            id=identity.read_text().strip(),
            resume="allow",
            mode=self._settings.mode,  # type: ignore[arg-type]
            project=self._settings.project,
            name=config.run.name,
            dir=folder,
            config=asdict(config),
            settings=wandb.Settings(silent=self._settings.mode == "offline"),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a record; it has a ``step``."""
        self._run.log({"step": record["step"], **grouped(record)}, step=record["step"])

    def predicted(self, breakdown: Mapping[str, int]) -> None:
        """Put the planner's breakdown of the peak (bytes by kind) into the run's summary."""
        for kind, size in breakdown.items():
            self._run.summary[f"memory/predicted/{kind}"] = size / GIB

    def checkpoints(self) -> None:
        """With logging.wandb.artifacts=all: send the checkpoints that are new and whole."""
        if self._settings.artifacts == "all":
            for path in self._complete():
                if path not in self._sent:
                    self._send(path)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Send the outcome."""
        self._run.summary.update(grouped(summary))

    def close(self, exit_code: int) -> None:
        """End this process's part, and say how an offline one is sent."""
        self.checkpoints()
        if self._settings.artifacts == "last":
            for path in self._complete()[-1:]:
                self._send(path)
        folder = Path(self._run.dir).parent
        self._run.finish(exit_code=exit_code)
        if self._settings.mode == "offline":
            log.info("W&B is offline; to send the run: wandb sync %s", folder)

    def _complete(self) -> list[Path]:
        return complete_checkpoints(self._checkpoints)

    def _send(self, path: Path) -> None:
        artifact = self._wandb.Artifact(f"checkpoint-{self._run.id}", type="model")
        artifact.add_dir(str(path))  # copied, because the folder may be deleted before it is sent
        self._run.log_artifact(artifact, aliases=["latest", path.name])
        self._sent.add(path)


def start_wandb(folder: Path, config: Config) -> WandbRun | None:
    """The run's part in W&B; None where it is disabled or not installed.

    Raises UserError where it is not installed and logging.wandb.mode is online.
    """
    mode = config.logging.wandb.mode
    if mode == "disabled":
        return None
    if importlib.util.find_spec("wandb") is not None:
        return WandbRun(folder, config)
    if mode == "online":
        raise UserError(
            "logging.wandb.mode=online, but wandb is not installed: pip install wandb, or set "
            "logging.wandb.mode=disabled"
        )
    log.info("wandb is not installed: metrics go to %s alone", folder / "metrics.jsonl")
    return None
