"""The engine of one process, and of several that hold the whole model each."""

from typing import Any

from torch import Tensor, nn

from mst_train.distributed import Topology
from mst_train.engine.protocol import State, own_parameters
from mst_train.optim import InBackwardOptimizer, Optimizer


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

    def set_learning_rate(self, rate: float) -> None:
        self._optimizer.set_learning_rate(rate)

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

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def state(self) -> tuple[dict[str, Tensor], State]:
        own = own_parameters(self.model, self.topology)
        weights, state = self.model.state_dict(), self._optimizer.state_dict()
        return {n: weights[n] for n in weights if n in own}, {
            n: state[n] for n in state if n in own
        }

    def load(self, weights: dict[str, Tensor], state: State) -> None:
        self.model.load_state_dict(weights)
        self._optimizer.load_state_dict(state)
