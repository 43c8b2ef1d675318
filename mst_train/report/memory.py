"""What the planner says of a run's memory at its own length and at others."""

from dataclasses import replace
from typing import Any

from mst_train.compose import recompose
from mst_train.config import Config
from mst_train.errors import UserError
from mst_train.memory.devices import find_device
from mst_train.plan.predict import make_target
from mst_train.plan.sweep import at_length
from mst_train.report.read import Run

SHORTEST = 64


def over_lengths(run: Run) -> list[dict[str, Any]]:
    """Predictions (``Prediction.report``) for the run at a quarter of its length to twice it.

    For the settings and the device that it was started with. Only its own length where the planner
    does not know the device, nothing where the run has no prediction.
    """
    if not run.prediction:
        return []
    own = int(run.prediction["sequence_length"])
    try:
        config = _as_planned(recompose(run.settings, []), run.prediction)
        device = find_device(run.prediction["device"])
        target = make_target(config, device)
    except UserError:
        return [run.prediction]
    degree = config.parallel.sequence_parallel
    others = {length for length in (own // 4, own // 2, 2 * own) if length >= SHORTEST}
    found = [at_length(config, target, n).report() for n in others if n % degree == 0]
    return sorted([*found, run.prediction], key=lambda report: report["sequence_length"])


def _as_planned(config: Config, prediction: dict[str, Any]) -> Config:
    """The settings that memory.policy=auto stood for, where it did."""
    memory = replace(
        config.memory,
        policy=prediction["policy"],
        keep_attention=prediction["keep_attention"],
        offload=prediction["offload"],
    )
    optimizer = replace(config.optimizer, in_backward=prediction["in_backward"])
    plan = replace(config.plan, gpus=prediction["gpus"])
    return replace(config, memory=memory, optimizer=optimizer, plan=plan)
