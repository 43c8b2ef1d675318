"""What the planner says of a run's memory at its own length and at others."""

import logging
from dataclasses import replace
from typing import Any

from mst_train.cli.compose import recompose
from mst_train.config import Config, KeepConfig
from mst_train.errors import UserError
from mst_train.memory.devices import find_device
from mst_train.model.flops import parameter_count
from mst_train.plan.candidates import SMALL_BLOCK_CHUNK
from mst_train.plan.choose import at_length
from mst_train.plan.predict import make_target
from mst_train.report.read import Run

SHORTEST = 64

log = logging.getLogger(__name__)


def over_lengths(run: Run) -> list[dict[str, Any]]:
    """Predictions (``Prediction.report``) for the run at a quarter of its length to twice it.

    For the settings and the device that it was started with. Only its own length where the planner
    does not know the device or, with a warning, the prediction is not that of the settings; nothing
    where the run has no prediction.
    """
    if not run.prediction or not run.settings:
        return [run.prediction] if run.prediction else []
    try:
        config = _as_planned(recompose(run.settings, []), run.prediction)
        if not _belong(config, run.prediction):
            raise UserError("they are not those of prediction.json")
    except UserError as error:
        log.warning(
            "%s cannot be planned with (%s): the page has no memory at other lengths",
            run.folder / "config.yaml",
            error,
        )
        return [run.prediction]
    own, degree = config.data.sequence_length, config.parallel.sequence_parallel
    others = {length for length in (own // 4, own // 2, 2 * own) if length >= SHORTEST}
    try:
        device = find_device(run.prediction["device"])
        target = make_target(config, device, run.prediction["gpus"])
        found = [at_length(config, target, n).report() for n in others if n % degree == 0]
    except UserError:
        return [run.prediction]
    return sorted([*found, run.prediction], key=lambda report: report["sequence_length"])


def _belong(config: Config, prediction: dict[str, Any]) -> bool:
    """Whether a prediction is of these settings, as far as that is quickly told."""
    train, length = config.train, config.data.sequence_length
    sequences = prediction["gpus"] // config.parallel.sequence_parallel
    sequences *= train.micro_batch_size * train.accumulation_steps
    lengths = (prediction["sequence_length"], prediction["tokens_per_step"])
    held: int = prediction["gpus"] * prediction["breakdown"]["parameters"]
    return lengths == (length, sequences * length) and held >= 2 * parameter_count(config.model)


def _as_planned(config: Config, prediction: dict[str, Any]) -> Config:
    """The settings that memory.policy=auto stood for, where it did."""
    memory = replace(
        config.memory,
        policy=prediction["policy"],
        keep=KeepConfig(**prediction["keep"]),
        offload=prediction["offload"],
    )
    if prediction.get("block_chunk_tokens") == SMALL_BLOCK_CHUNK:
        memory = replace(memory, block_chunk_tokens=SMALL_BLOCK_CHUNK)
    optimizer = replace(
        config.optimizer,
        in_backward=prediction["in_backward"],
        offload=prediction.get("optimizer_offload", config.optimizer.offload),
    )
    return replace(config, memory=memory, optimizer=optimizer)
