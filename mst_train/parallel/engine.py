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

from typing import Any, Protocol

from torch import Tensor, nn

from mst_train.config import Config
from mst_train.errors import UserError
from mst_train.optim import Optimizer, build_optimizer
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
        """The weights and the optimizer's state on the first process; nothing on the others.

        Whole tensors by name, whoever holds which part of them, so that a run may go on with
        another number of processes or another ``parallel.zero_stage``.
        """
        ...

    def load(self, weights: dict[str, Tensor], state: State) -> None:
        """Take over what ``state`` gave; every process is given all of it.

        Raises UserError where it belongs to other parameters or another precision.
        """
        ...


def build_engine(model: nn.Module, config: Config, topology: Topology) -> Engine:
    """The engine that ``parallel.zero_stage`` asks for.

    Raises UserError where several processes cannot do what the configuration wants.
    """
    if topology.world > 1:
        _check(config)
        if config.parallel.zero_stage > 0:
            from mst_train.parallel.zero import ZeroEngine

            return ZeroEngine(model, config, topology)
    optimizer = build_optimizer(
        model, config.optimizer, master_weights=config.precision == "bf16_master"
    )
    return NativeEngine(model, optimizer, topology)


class NativeEngine:
    """Every process holds the whole model and optimizer; gradients are summed after the backward.

    With one process this is the model and its optimizer. The sum has the type in which gradients
    add up over micro-batches: fp32 with master weights, the weights' own without.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, topology: Topology) -> None:
        self.topology = topology
        self.after_bad_gradient = optimizer.after_bad_gradient
        self.survives_bad_gradient = optimizer.survives_bad_gradient
        self.remedies = optimizer.remedies
        self._model = model
        self._optimizer = optimizer

    def __call__(self, *arguments: Any) -> Any:
        return self._model(*arguments)

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
        if not self.topology.is_first:
            return {}, {}
        return self._model.state_dict(), self._optimizer.state_dict()

    def load(self, weights: dict[str, Tensor], state: State) -> None:
        self._model.load_state_dict(weights)
        self._optimizer.load_state_dict(state)


def _check(config: Config) -> None:
    problems = []
    if config.optimizer.in_backward:
        problems.append(
            "optimizer.in_backward=true updates weights before their gradients are summed over "
            "the processes: set optimizer.in_backward=false"
        )
    if config.optimizer.offload != "none":
        problems.append(
            f"optimizer.offload={config.optimizer.offload} works in one process alone: set "
            f"optimizer.offload=none, and parallel.zero_stage=1 or higher to share out the states"
        )
    if config.parallel.zero_stage > 0 and config.precision == "bf16":
        problems.append(
            f"precision=bf16 keeps weights and states in bf16 alone, and parallel.zero_stage="
            f"{config.parallel.zero_stage} keeps fp32 ones: set precision=bf16_master, or "
            f"parallel.zero_stage=0"
        )
    if config.parallel.zero_stage == 3 and config.model.from_pretrained is not None:
        problems.append(
            f"model.from_pretrained={config.model.from_pretrained} is read into whole weights, "
            f"and parallel.zero_stage=3 has parts of them: set parallel.zero_stage=2 or lower"
        )
    if problems:
        raise UserError(problems)
