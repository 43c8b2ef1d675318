"""The engine that a configuration asks for, and what it cannot have."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from mst_train.config import Config
from mst_train.distributed import Topology
from mst_train.engine.native import NativeEngine
from mst_train.engine.protocol import Engine
from mst_train.errors import UserError
from mst_train.optim import build_optimizer


def build_engine(model: nn.Module, config: Config, topology: Topology) -> Engine:
    """The engine that ``parallel.zero_stage`` asks for; one process has nothing to share out.

    Raises UserError where several processes cannot do what the configuration wants.
    """
    check_engine(config, topology.world)
    if topology.world > 1 and config.parallel.zero_stage > 0:
        from mst_train.engine.zero import ZeroEngine

        return ZeroEngine(model, config, topology)
    optimizer = build_optimizer(
        model, config.optimizer, master_weights=config.precision == "bf16_master"
    )
    return NativeEngine(model, optimizer, topology)


def partition(config: Config, topology: Topology) -> Callable[[nn.Module], object] | None:
    """For ``model.build_model``: what leaves each process its part of a module's weights; None
    where every process holds them all.
    """
    if topology.world == 1 or config.parallel.zero_stage < 3:
        return None
    from mst_train.engine.zero import partition_weights

    return partition_weights(config, topology)


def whole_parameters(
    config: Config, topology: Topology
) -> Callable[[nn.Parameter], AbstractContextManager[object]]:
    """For ``copy_weights``: where a parameter is whole, and the first process's values count.

    All processes come to each parameter together.
    """
    if topology.world == 1 or config.parallel.zero_stage < 3:
        return nullcontext
    from mst_train.engine.zero import whole_parameter

    return whole_parameter


def engine_problems(config: Config, world: int) -> Iterator[str]:
    """Why ``world`` processes cannot update weights as configured, whatever is installed."""
    if world == 1:
        return
    stage = config.parallel.zero_stage
    if config.optimizer.in_backward and stage > 0:
        yield (
            f"optimizer.in_backward=true updates whole weights, and parallel.zero_stage="
            f"{stage} has parts of them: set one of them to false or 0"
        )
    if config.optimizer.offload != "none" and stage == 0:
        yield (
            f"optimizer.offload={config.optimizer.offload} in several processes needs their parts "
            f"of the states: set parallel.zero_stage=1, 2 or 3, or optimizer.offload=none"
        )
    if stage > 0 and config.precision == "bf16":
        yield (
            f"precision=bf16 keeps weights and states in bf16 alone, and parallel.zero_stage="
            f"{stage} keeps fp32 ones: set precision=bf16_master, or parallel.zero_stage=0"
        )


def check_engine(config: Config, world: int) -> None:
    """Whether ``world`` processes can update weights as configured, here; UserError where not."""
    problems = [*engine_problems(config, world)]
    if (
        world > 1
        and config.parallel.zero_stage > 0
        and importlib.util.find_spec("deepspeed") is None
    ):
        problems.append(
            f"parallel.zero_stage={config.parallel.zero_stage} needs the package deepspeed, which "
            f"is not installed: pip install 'mst-train[distributed]', or set parallel.zero_stage=0"
        )
    if problems:
        raise UserError(problems)
