"""One optimizer step by one process or by many: the same numbers either way.

Every process computes the loss of its own tokens, divided by the number of valid tokens of the
whole step, which all of them know before the first backward. The step's gradient is then the sum
over all processes and micro-batches, never a mean of means:

    valid_tokens = engine.topology.total([own valid tokens])
    engine.begin_step(rate)
    for each micro-batch:
        loss_sum, _ = engine(tokens, labels, positions, documents)
        engine.backward(loss_sum / valid_tokens, last=...)
    norm = engine.gradient_norm()
    engine.clip(max_norm, norm)
    engine.step()

All processes make the same calls in the same order.
"""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mst_train.config import Config
from mst_train.errors import UserError
from mst_train.optim import InBackwardOptimizer, Optimizer, build_optimizer
from mst_train.parallel.topology import Topology

State = dict[str, dict[str, Tensor]]
"""For each parameter, by name: what ``optim.Optimizer.state_dict`` gives."""


class Engine(Protocol):
    """A model and its optimizer, whoever holds which part of them."""

    topology: Topology
    after_bad_gradient: str
    """What a gradient that is not finite has done, known once ``gradient_norm`` is."""
    survives_bad_gradient: bool
    """Whether weights and states are then as they were before the step."""
    remedies: str
    """What to change after one."""

    def __call__(self, *arguments: Any) -> Any:
        """The model's forward, on this process's rows."""
        ...

    def begin_step(self, rate: float) -> None:
        """Before the step's first forward: the learning rate of the step."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this process's part of the step's loss.

        last: whether this is the step's last micro-batch.
        """
        ...

    def gradient_norm(self) -> Tensor:
        """The global norm of the step's gradient, the same on all processes; once a step."""
        ...

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scale the gradient, whose global norm is ``norm``, to at most ``max_norm``."""
        ...

    def step(self) -> None:
        """Update the weights and forget the gradient: the step is done."""
        ...

    def abandon_step(self) -> None:
        """Forget the gradient of a step that was not finished."""
        ...

    def state(self) -> tuple[dict[str, Tensor], State]:
        """The weights and the optimizer's state: of some parameters on each process, of all of them
        on all processes together.

        Whole tensors by name, whoever holds which part of them, so that a run may go on with
        another number of processes or another ``parallel.zero_stage``.
        """
        ...

    def load(self, weights: dict[str, Tensor], state: State) -> None:
        """Take over what ``state`` gave; every process is given that of all processes.

        Raises UserError where it belongs to other parameters or another precision.
        """
        ...


def build_engine(model: nn.Module, config: Config, topology: Topology) -> Engine:
    """The engine that ``parallel.zero_stage`` asks for; one process has nothing to share out.

    Raises UserError where several processes cannot do what the configuration wants.
    """
    check_engine(config, topology.world)
    if topology.world > 1 and config.parallel.zero_stage > 0:
        from mst_train.parallel.zero import ZeroEngine

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
    from mst_train.parallel.zero import partition_weights

    return partition_weights(config, topology)


def whole_parameters(
    config: Config, topology: Topology
) -> Callable[[nn.Parameter], AbstractContextManager[object]]:
    """For ``copy_weights``: where a parameter is whole, and the first process's values count.

    All processes come to each parameter together.
    """
    if topology.world == 1 or config.parallel.zero_stage < 3:
        return nullcontext
    from mst_train.parallel.zero import whole_parameter

    return whole_parameter


class NativeEngine:
    """Every process holds the whole model and optimizer; gradients are summed after the backward.

    With one process this is the model and its optimizer. The sum has the type in which gradients
    add up over micro-batches: fp32 with master weights, the weights' own without. With an optimizer
    in the backward, each gradient is summed as soon as it is there.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, topology: Topology | None = None
    ) -> None:
        """``topology``: by default the process is alone, on its model's device."""
        self.topology = topology or Topology(device=next(model.parameters()).device)
        self.model = model
        self.after_bad_gradient = optimizer.after_bad_gradient
        self.survives_bad_gradient = optimizer.survives_bad_gradient
        self.remedies = optimizer.remedies
        self._optimizer = optimizer
        if isinstance(optimizer, InBackwardOptimizer):
            optimizer.exchange = self.topology.sum_

    def __call__(self, *arguments: Any) -> Any:
        return self.model(*arguments)

    def begin_step(self, rate: float) -> None:
        self._optimizer.begin_step(rate)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        if last:
            self.topology.sum_(self._optimizer.gradients())

    def gradient_norm(self) -> Tensor:
        return self._optimizer.gradient_norm()

    def clip(self, max_norm: float, norm: Tensor) -> None:
        self._optimizer.clip(max_norm, norm)

    def step(self) -> None:
        self._optimizer.step()

    def abandon_step(self) -> None:
        self._optimizer.abandon_step()

    def state(self) -> tuple[dict[str, Tensor], State]:
        own = own_parameters(self.model, self.topology)
        weights, state = self.model.state_dict(), self._optimizer.state_dict()
        return {n: weights[n] for n in weights if n in own}, {
            n: state[n] for n in state if n in own
        }

    def load(self, weights: dict[str, Tensor], state: State) -> None:
        self.model.load_state_dict(weights)
        self._optimizer.load_state_dict(state)


def own_parameters(model: nn.Module, topology: Topology) -> set[str]:
    """The parameters, by all of their names, whose state this process saves.

    Each goes to the process that has the least so far, so that all write about as much.
    """
    loads = [0] * topology.world
    owners: dict[nn.Parameter, int] = {}
    for parameter in model.parameters():
        owners[parameter] = loads.index(min(loads))
        loads[owners[parameter]] += full_shape(parameter).numel()
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if owners[parameter] == topology.rank
    }


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's whole shape, wherever its parts are."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def check_engine(config: Config, world: int) -> None:
    """Whether ``world`` processes can update weights as configured; UserError where not."""
    if world == 1:
        return
    problems = []
    if config.optimizer.in_backward and config.parallel.zero_stage > 0:
        problems.append(
            f"optimizer.in_backward=true updates whole weights, and parallel.zero_stage="
            f"{config.parallel.zero_stage} has parts of them: set one of them to false or 0"
        )
    if config.optimizer.offload != "none" and config.parallel.zero_stage == 0:
        problems.append(
            f"optimizer.offload={config.optimizer.offload} in several processes needs their parts "
            f"of the states: set parallel.zero_stage=1, 2 or 3, or optimizer.offload=none"
        )
    if config.parallel.zero_stage > 0 and config.precision == "bf16":
        problems.append(
            f"precision=bf16 keeps weights and states in bf16 alone, and parallel.zero_stage="
            f"{config.parallel.zero_stage} keeps fp32 ones: set precision=bf16_master, or "
            f"parallel.zero_stage=0"
        )
    if config.parallel.zero_stage > 0 and importlib.util.find_spec("deepspeed") is None:
        problems.append(
            f"parallel.zero_stage={config.parallel.zero_stage} needs the package deepspeed, which "
            f"is not installed: pip install 'mst-train[distributed]', or set parallel.zero_stage=0"
        )
    if problems:
        raise UserError(problems)
