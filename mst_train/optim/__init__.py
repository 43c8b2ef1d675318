"""AdamW and Muon: their learning-rate schedule, the weights' precision, where and when weights are
updated.

adamw         ``Optimizer``: on the device, after the backward
in_backward   ``InBackwardOptimizer``: there, each parameter as soon as its gradient is there
host          ``HostOptimizer``: on the host, by ``cpu_adam``, DeepSpeed's; the device has no states
build         which of them a configuration asks for
muon          Muon for the blocks' matrices, in the first two
schedule      the learning rate

All three are used in the same way and save the same state, so a run may change from one to another
at a checkpoint:

    optimizer.set_learning_rate(rate)
    loss.backward()
    norm = optimizer.gradient_norm()
    optimizer.clip(max_norm, norm)
    optimizer.step()
"""

from mst_train.optim.adamw import ADAMW_STATES, MUON_STATES, Optimizer, build_adamw
from mst_train.optim.build import build_optimizer
from mst_train.optim.host import HostOptimizer
from mst_train.optim.in_backward import InBackwardOptimizer
from mst_train.optim.schedule import learning_rate, too_short

__all__ = [
    "ADAMW_STATES",
    "MUON_STATES",
    "HostOptimizer",
    "InBackwardOptimizer",
    "Optimizer",
    "build_adamw",
    "build_optimizer",
    "learning_rate",
    "too_short",
]
