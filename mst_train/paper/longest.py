"""The longest sequence that one GPU can train on, predicted: transformers' model and this one."""

from collections.abc import Callable, Sequence
from typing import Any

from mst_train.memory.simulate import Build
from mst_train.paper.reported import MODELS, Reported
from mst_train.plan.baseline import transformers_baseline
from mst_train.plan.choose import longest
from mst_train.plan.config import configured_target, read
from mst_train.plan.search import STEP

BASELINE_STEP = 256
"""What exists today reaches short sequences: its limits are found to 256 tokens."""

OFFLOADED = "Llama3-8B"
OFFLOAD = ("memory.offload=host", "memory.host_budget_gib=512")


def longest_sequences(
    advance: Callable[[str], None], models: Sequence[Reported] = MODELS
) -> dict[str, Any]:
    """For each model what the paper reports and what is predicted."""
    return {
        "rows": [
            {"reported": model._asdict(), "predicted": _limits(model, advance)} for model in models
        ]
    }


def _limits(model: Reported, advance: Callable[[str], None]) -> dict[str, Any]:
    """The prediction at the longest sequence of each way; None where no length fits."""

    def limit(name: str, step: int, build: Build | None, *settings: str) -> dict[str, Any] | None:
        config = read([f"+experiment={model.experiment}", *settings])

        def heard(what: str) -> None:
            advance(f"{model.name}, {name}: {what}")

        found = longest(config, configured_target(config), heard, build=build, step=step)
        return None if found is None else found.report()

    found = {
        name: limit(
            name, BASELINE_STEP, transformers_baseline(gradient_checkpointing=checkpointing)
        )
        for name, checkpointing in (("vanilla", False), ("recompute", True))
    }
    found["mst"] = limit("mst", STEP, None)
    if model.name == OFFLOADED:
        found["offload"] = limit("offload", STEP, None, *OFFLOAD)
    return found
