"""A run in Weights & Biases: its metrics in groups, its settings, and its checkpoints by choice.

Offline, everything is written below the run's folder, and nothing is sent before ``wandb sync``.
Nothing that W&B meets ends a run: where it cannot start online it starts offline, and where it
cannot do that either, the run goes on without it.
"""

import contextlib
import importlib.util
import logging
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mst_train.checkpoint.files import complete_checkpoints
from mst_train.config import Config
from mst_train.files import replace_text
from mst_train.tracking.names import grouped
from mst_train.units import GIB

START_SECONDS = 30.0
"""How long W&B may take to reach its server, or to be given a key at a terminal, before the run
begins; for the former, W&B's own WANDB_INIT_TIMEOUT goes before."""

log = logging.getLogger(__name__)


class WandbRun:
    """One process's part of a run; a run that continues is the same run in W&B."""

    name = "W&B"

    def __init__(self, folder: Path, config: Config, mode: str) -> None:
        """Start it; raises whatever W&B, its process, the network and the disk raise.

        Args:
            folder: the run's.
            mode: online or offline.
        """
        import wandb

        self._wandb, self._settings = wandb, config.logging.wandb
        self._checkpoints = folder / "checkpoints"
        self._sent = set(self._complete()) if self._settings.artifacts == "all" else set()
        settings = wandb.Settings(silent=mode == "offline", login_timeout=START_SECONDS)
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            settings.init_timeout = START_SECONDS
        self._run = wandb.init(
            id=_identity(folder / "wandb_run_id"),
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            project=self._settings.project,
            name=config.run.name,
            dir=folder,
            config=asdict(config),
            settings=settings,
        )
        if self._run.disabled:
            raise RuntimeError("nobody has given it a key, or it is disabled by its own settings")
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    @property
    def folder(self) -> Path:
        """What ``wandb sync`` takes."""
        return Path(self._run.dir).parent

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
        folder, offline = self.folder, self._run.offline
        self._run.finish(exit_code=exit_code)
        if offline:
            log.info("W&B is offline; to send the run: wandb sync %s", folder)

    def _complete(self) -> list[Path]:
        return complete_checkpoints(self._checkpoints)

    def _send(self, path: Path) -> None:
        artifact = self._wandb.Artifact(f"checkpoint-{self._run.id}", type="model")
        artifact.add_dir(str(path))  # copied, because the folder may be deleted before it is sent
        self._run.log_artifact(artifact, aliases=["latest", path.name])
        self._sent.add(path)


def start_wandb(folder: Path, config: Config) -> WandbRun | None:
    """The run's part in W&B; None where it is disabled, not installed or cannot start.

    One that cannot start online is offline. A warning says why, and what to do.
    """
    mode = config.logging.wandb.mode
    if mode == "disabled":
        return None
    records = folder / "metrics.jsonl"
    reasons: list[str] = []
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            if importlib.util.find_spec("wandb") is None:
                log.log(
                    logging.WARNING if mode == "online" else logging.INFO,
                    "wandb is not installed: metrics go to %s alone (pip install wandb to have "
                    "W&B, or set logging.wandb.mode=disabled)",
                    records,
                )
                return None
            run = WandbRun(folder, config, attempt)
        except Exception as error:  # whatever W&B, its process, the network and the disk raise
            reasons.append(" ".join(str(error).split()) or type(error).__name__)
            _end_process()
            continue
        if reasons:
            log.warning(
                "W&B cannot start online (%s): the run goes on with W&B offline. To send this "
                "part of it later: wandb sync %s. For the next start, see to what is named there "
                "(a key: wandb login or WANDB_API_KEY), or set logging.wandb.mode=offline",
                reasons[0],
                run.folder,
            )
        return run
    log.warning(
        "W&B cannot start (%s): the run goes on without it, with its records in %s. For the next "
        "start, see to what is named there, or set logging.wandb.mode=disabled",
        "; ".join(dict.fromkeys(reasons)),
        records,
    )
    return None


def _end_process() -> None:
    """End W&B's own process, where there is one: it would refuse the same run a second time."""
    with contextlib.suppress(Exception):  # as what it is called for
        import wandb

        wandb.teardown()


def _identity(path: Path) -> str:
    """The run's name in W&B's own records: the one that ``path`` keeps, or a new one."""
    kept = path.read_text(errors="replace").strip() if path.exists() else None
    if kept is not None and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", kept):
        return kept
    if kept is not None:
        log.warning("%s is damaged: from here on W&B has this as another run", path)
    identity = uuid.uuid4().hex[:8]
    replace_text(path, identity)
    return identity
