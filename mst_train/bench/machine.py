"""The device to measure on, made ready."""

import torch

from mst_kernels import set_backend
from mst_train.bench.config import BenchConfig
from mst_train.errors import UserError


def prepare_device(config: BenchConfig) -> torch.device:
    """The device to measure on, with the threads and kernels that are configured."""
    if config.bench.threads is not None:
        torch.set_num_threads(config.bench.threads)
    try:
        set_backend(config.kernel.backend)
    except ValueError as error:
        raise UserError(
            f"kernel.backend={config.kernel.backend} cannot be used: {error}"
        ) from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
