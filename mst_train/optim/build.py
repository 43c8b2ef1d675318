"""The optimizer that a configuration asks for."""

from torch import nn

from mst_train.config import OptimizerConfig
from mst_train.optim.adamw import Optimizer
from mst_train.optim.host import HostOptimizer
from mst_train.optim.in_backward import InBackwardOptimizer


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, master_weights: bool
) -> Optimizer:
    """The optimizer that ``optimizer.in_backward`` and ``optimizer.offload`` ask for.

    Raises UserError where DeepSpeed is asked for and cannot be used.
    """
    if config.in_backward:
        return InBackwardOptimizer(model, config, master_weights=master_weights)
    if config.offload == "host":
        return HostOptimizer(model, config, master_weights=master_weights)
    return Optimizer(model, config, master_weights=master_weights)
