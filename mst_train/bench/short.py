"""What the method costs at lengths that do not need it."""

from typing import Any

import torch

from mst_train.bench import step
from mst_train.bench.config import BenchConfig
from mst_train.bench.workload import lengths

VARIANTS = ("vanilla", "recompute", "mst")


def run(config: BenchConfig, device: torch.device) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of measurements, and what is wrong with them."""
    longest = max(lengths(config))
    return step.run(config, device, VARIANTS, lambda n: max(min(longest // n // 2, 8), 1))
