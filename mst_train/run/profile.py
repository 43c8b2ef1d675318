"""torch's profile of some steps: train.profile=[FROM,TO]."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mst_train.distributed import Topology
from mst_train.files import writing

log = logging.getLogger(__name__)


class StepProfile:
    """Profiles the steps from the first to the last of ``steps``; nothing where these are empty.

    Each process writes its own file to the run's folder, for chrome://tracing or Perfetto.
    """

    def __init__(self, steps: Sequence[int], folder: Path, topology: Topology) -> None:
        self._first, self._last = steps or (0, 0)
        self._topology = topology
        self._file = folder / f"profile_{self._first}_{self._last}_rank{topology.rank}.json.gz"
        self._profile: Any = None

    def before(self, step: int) -> None:
        """A step begins."""
        if self._profile is None and self._first <= step <= self._last:
            activities = [ProfilerActivity.CPU]
            if self._topology.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, profile_memory=True)
            self._profile.start()

    def after(self, step: int) -> None:
        """A step is done; after the last one the file is written.

        Raises TrainingError where it cannot be.
        """
        if self._profile is None or step < self._last:
            return
        if self._topology.device.type == "cuda":
            torch.cuda.synchronize(self._topology.device)
        done = self._profile
        self.close()
        with writing(self._file):
            done.export_chrome_trace(str(self._file))
        log.info("the profile: %s", self._file)

    def close(self) -> None:
        """Profile no further; what has no file yet gets none."""
        if self._profile is not None:
            self._profile.stop()
        self._profile, self._first, self._last = None, 0, 0
