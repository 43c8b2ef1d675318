"""The device to measure on, made ready."""

import torch

from mst_train.attention import select_kernels
from mst_train.bench.config import BenchConfig
from mst_train.precision import weight_type


def prepare_device(config: BenchConfig) -> torch.device:
    """The device to measure on, with the threads and kernels that are configured."""
    if config.bench.threads is not None:
        torch.set_num_threads(config.bench.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    select_kernels(config.kernel, device, weight_type(config.precision))
    return device
