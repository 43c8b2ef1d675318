"""Updates in the backward: no gradient outlives its parameter's update."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from mst_train.config import OptimizerConfig
from mst_train.errors import TrainingError
from mst_train.optim.adamw import Optimizer, global_norm


class InBackwardOptimizer(Optimizer):
    """Updates each parameter in the backward, as soon as its gradient is there.

    The numbers are those of ``Optimizer``: once a parameter's gradient is complete, nothing else in
    the backward reads the parameter. There is one backward per step, and no clipping, because the
    gradient's norm is known only when all weights are updated.

    Memory: two states (and fp32 copies) as in ``Optimizer``, but one parameter's gradient at a time
    (after LOMO, Lv et al. 2023, and PyTorch's tutorial on optimizer steps in the backward).

    Raises:
        RuntimeError: a second backward in a step, or clipping.
        TrainingError: ``state_dict`` in the middle of a step, or after one that was not finished
            because its gradient was not finite.
    """

    after_bad_gradient = (
        "with optimizer.in_backward=true the weights were updated before it was known, so this "
        "step's weights are damaged; the last checkpoint is whole"
    )
    survives_bad_gradient = False
    remedies = (
        "a lower optimizer.learning_rate, a longer optimizer.warmup_steps, or "
        "optimizer.in_backward=false and a small optimizer.max_grad_norm"
    )

    def __init__(self, model: nn.Module, config: OptimizerConfig, *, master_weights: bool) -> None:
        super().__init__(model, config, master_weights=master_weights)
        self._norms: dict[str, Tensor] = {}
        """The gradient's norm of each parameter that this step has updated."""
        self.exchange: Callable[[Sequence[Tensor]], None] = lambda gradients: None
        """Called with each gradient before it is used: where several processes have parts of it,
        this makes it their sum."""

    def gradient_norm(self) -> Tensor:
        return global_norm(self._norms[name] for name in self._weights if name in self._norms)

    def clip(self, max_norm: float, norm: Tensor) -> None:
        raise RuntimeError("weights that are updated in the backward leave nothing to clip")

    def zero_grad(self) -> None:
        super().zero_grad()
        self._norms.clear()

    def step(self) -> None:
        """The step is done; its gradient was finite."""
        self._norms.clear()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        if self._norms:
            raise TrainingError(
                "this step's weights are damaged or not complete, and cannot be saved: continue "
                "from the last checkpoint"
            )
        return super().state_dict()

    def _takes_gradients(self) -> bool:
        return True

    def _receive(self, name: str, gradient: Tensor) -> None:
        if name in self._norms:
            raise RuntimeError("weights that are updated in the backward allow one per step")
        weight = self._weights[name]
        weight.grad = gradient.to(weight.dtype)
        self.exchange([weight.grad])
        self._norms[name] = global_norm([weight.grad])
        self._updates[name].step()  # of this weight: it alone has a gradient
        weight.grad = None
        self._write_back([name])
