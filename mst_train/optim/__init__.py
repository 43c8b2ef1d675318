"""AdamW: its learning-rate schedule, the weights' precision, where and when weights are updated.

    Optimizer              on the device, after the backward
    InBackwardOptimizer    on the device, each parameter as soon as its gradient is there
    HostOptimizer          on the host, after the backward; the device holds no states

All three are used in the same way and save the same state, so a run may change from one to another
at a checkpoint:

    optimizer.begin_step(rate)
    loss.backward()
    norm = optimizer.gradient_norm()
    optimizer.clip(max_norm, norm)
    optimizer.step()
"""

from mst_train.optim.adamw import Optimizer, build_adamw
from mst_train.optim.build import build_optimizer
from mst_train.optim.host import HostOptimizer
from mst_train.optim.in_backward import InBackwardOptimizer
from mst_train.optim.schedule import learning_rate

__all__ = [
    "HostOptimizer",
    "InBackwardOptimizer",
    "Optimizer",
    "build_adamw",
    "build_optimizer",
    "learning_rate",
]
