"""What every engine does, and how processes share the saving of its state."""

from typing import Any, Protocol

from torch import Tensor, nn

from mst_train.deepspeed_adapter import full_shape
from mst_train.distributed import Topology

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
        """The model's forward, on this process's part of the sequences."""
        ...

    def set_learning_rate(self, rate: float) -> None:
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

    def zero_grad(self) -> None:
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
