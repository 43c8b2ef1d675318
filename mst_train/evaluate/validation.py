"""The validation loss, and that of each set that has a name."""

from collections.abc import Iterable, Mapping
from typing import Any

from mst_train.config import TrainConfig
from mst_train.data import Batch, Data, fixed_batches
from mst_train.distributed import Topology
from mst_train.engine.positions import ValidationLoss
from mst_train.engine.step import evaluate
from mst_train.model import Transformer

ALL = ""
"""The name of what is held out of all that is trained on."""


def validation_batches(data: Data, train: TrainConfig) -> dict[str, list[Batch]]:
    """What each loss is the mean over, by the set's name: the same sequences each time."""
    sets = dict(data.validation_sets)
    if data.validation is not None:
        sets = {ALL: data.validation} | sets
    return {
        name: list(fixed_batches(some, train.micro_batch_size, train.eval_sequences))
        for name, some in sets.items()
    }


def validate(
    model: Transformer, batches: Mapping[str, Iterable[Batch]], topology: Topology | None = None
) -> tuple[ValidationLoss | None, dict[str, Any]]:
    """The loss over all that is held out, and for metrics.jsonl that and those of the sets.

    Raises TrainingError where no token of a set has a label.
    """
    found = {name: evaluate(model, some, topology) for name, some in batches.items()}
    whole = found.pop(ALL, None)
    record = {} if whole is None else whole.record()
    return whole, record | {f"val_loss_{name}": loss.mean for name, loss in found.items()}
