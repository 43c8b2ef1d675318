"""The same sums in the same order each time, where a GPU would add as results come."""

import os

import torch

from mst_train.config import Config

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def choose_algorithms(config: Config) -> None:
    """Torch's deterministic algorithms for this process, where ``train.deterministic`` asks for
    them. To be called before the first matrix product, when cuBLAS reads its variable.
    """
    if not config.train.deterministic:
        return
    os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Torch would write NaN into every new tensor, so that nobody reads what was there before.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
