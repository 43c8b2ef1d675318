"""Sequences shared by several GPUs, predicted for one of them."""

from collections.abc import Callable, Mapping
from typing import Any

from mst_train.paper.reported import SEVERAL_GPUS
from mst_train.plan.choose import longest
from mst_train.plan.config import configured_target, read
from mst_train.plan.predict import predict


def several_gpus(
    advance: Callable[[str], None], experiments: Mapping[tuple[str, int], str] = SEVERAL_GPUS
) -> dict[str, Any]:
    """Whether the paper's lengths fit, and the longest that do."""
    rows = []
    for (model, gpus), experiment in experiments.items():
        config = read([f"+experiment={experiment}"])
        target = configured_target(config)
        advance(f"{model} on {gpus} GPUs")
        limit = longest(config, target)
        rows.append(
            {
                "model": model,
                "gpus": gpus,
                "reported_tokens": config.data.sequence_length,
                "at_reported": predict(config, target).report(),
                "longest": limit and limit.report(),
            }
        )
    return {"rows": rows}
