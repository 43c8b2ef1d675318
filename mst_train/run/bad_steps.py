"""What follows a bad step: a loss or gradient that is not finite, or a loss that jumps up."""

import logging
import math
import statistics
from collections import deque
from typing import Any

from mst_train.config import TrainConfig
from mst_train.engine.step import BadStep
from mst_train.errors import TrainingError

log = logging.getLogger(__name__)


class BadSteps:
    """Says which loss is a spike, and whether a run leaves a bad step out or stops.

    A spike is a loss above ``train.spike_factor`` times the median of the last
    ``train.spike_window`` good steps' losses; before there are so many, no loss is one.

    Args:
        config: the settings above, ``train.bad_step`` and ``train.max_skipped_steps``.
        state: what ``state()`` gave when the run was saved, so that one that goes on decides as it
            would have; empty for a new run.
    """

    def __init__(self, config: TrainConfig, state: dict[str, Any]) -> None:
        self._config = config
        self._losses = deque[float](state.get("losses", ()), maxlen=config.spike_window)
        self._in_a_row = int(state.get("in_a_row", 0))

    @property
    def loss_limit(self) -> float:
        """The largest loss that is not a spike."""
        factor = self._config.spike_factor
        if factor is None or len(self._losses) < self._config.spike_window:
            return math.inf
        return factor * statistics.median(self._losses)

    def good(self, loss: float) -> None:
        """A step was done, at this loss."""
        self._losses.append(loss)
        self._in_a_row = 0

    def bad(self, step: int, problem: BadStep) -> None:
        """A step was bad; returns where it is left out.

        Raises TrainingError where the run stops: ``train.bad_step=stop``, weights that are damaged
        already, or more than ``train.max_skipped_steps`` bad steps in a row.
        """
        if self._config.bad_step == "stop" or not problem.can_skip:
            raise problem
        self._in_a_row += 1
        if self._in_a_row > self._config.max_skipped_steps:
            raise TrainingError(
                f"step {step} is bad ({problem.reason}), and so were the "
                f"{self._config.max_skipped_steps} before it, which were left out "
                f"(train.max_skipped_steps): continue from the last checkpoint with "
                f"{problem.remedies}"
            ) from problem
        log.warning("step %d is left out: %s", step, problem.reason)

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {"losses": list(self._losses), "in_a_row": self._in_a_row}
