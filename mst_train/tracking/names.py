"""What a record's numbers are called outside of metrics.jsonl."""

from collections.abc import Mapping
from typing import Any

from mst_train.config import TASKS
from mst_train.units import GIB

SCORES = ("accuracy", "exact", "loss")
"""What a task's record has, the means over all its texts, besides what chance would give."""

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
    **{f"{task}_{key}": f"{task}/{key}" for task in TASKS for key in SCORES},
}
"""What a record's numbers are called there; others are "train/" and their own name."""

CONSTANT = {f"{task}_{key}" for task in TASKS for key in ("chance", "exact_chance")}
"""What is the same in each record of a run, and is not sent."""


def grouped(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers as W&B and TensorBoard get them, by "group/name"; sizes in GiB."""
    values: dict[str, float] = {}
    for key, value in record.items():
        if key == "val_loss_by_position":
            values |= {f"val_loss/position_{int(at):04d}": loss for at, loss in value.items()}
        elif key.startswith("val_loss_"):
            values[f"val/loss_{key.removeprefix('val_loss_')}"] = value
        elif key == "expert_load":
            values |= {f"experts/load_{number:03d}": share for number, share in enumerate(value)}
            values["experts/most_used"] = max(value) * len(value)
            values["experts/least_used"] = min(value) * len(value)
        elif key in TASKS:
            for probe in value:
                depth = f"_depth_{100 * probe['depth']:03.0f}" if "depth" in probe else ""
                values[f"{key}/accuracy_{probe['length']}{depth}"] = probe["accuracy"]
        elif key in CONSTANT:
            continue
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            scale = GIB if key.endswith("_bytes") else 1
            values[NAMES.get(key, f"train/{key}")] = value / scale if scale != 1 else value
    return values
