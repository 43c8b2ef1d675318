"""AdamW, its learning-rate schedule, and the weights' precision."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mst_train.config import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step ``step`` (1 to ``steps``): linear warm-up, then half a cosine."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * cosine)


class Optimizer:
    """AdamW over a model's parameters.

    With ``master_weights`` it updates fp32 copies and rounds them into the model after each step.
    Gradients then move to the copies as the backward produces them, so that micro-batches add up in
    fp32 and the model's own gradients never exist together.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, *, master_weights: bool) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._weights = self._parameters
        if master_weights:
            self._weights = [
                nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in self._parameters
            ]
            for parameter, master in zip(self._parameters, self._weights, strict=True):
                _move_gradient(parameter, master)
        decayed = [w for w in self._weights if w.ndim > 1]
        others = [w for w in self._weights if w.ndim <= 1]
        self._adamw = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )

    def gradient_norm(self) -> Tensor:
        """The global norm of the gradient, fp32 at least, on the weights' device."""
        norms = [
            torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
            for g in self._gradients()
        ]
        return torch.linalg.vector_norm(torch.stack(norms))

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scale the gradient, whose global norm is ``norm``, to at most ``max_norm``."""
        nn.utils.clip_grads_with_norm_(self._weights, max_norm, norm)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update the weights with this learning rate and forget the gradient."""
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        if self._weights is not self._parameters:
            self._round_masters()

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, and the master weights where there are any."""
        masters = self._weights if self._weights is not self._parameters else []
        return {"adamw": self._adamw.state_dict(), "masters": [m.detach() for m in masters]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state saved by ``state_dict``."""
        self._adamw.load_state_dict(state["adamw"])
        for master, saved in zip(self._weights, state["masters"], strict=False):
            master.copy_(saved)

    def _gradients(self) -> list[Tensor]:
        return [w.grad for w in self._weights if w.grad is not None]

    def _round_masters(self) -> None:
        for parameter, master in zip(self._parameters, self._weights, strict=True):
            parameter.copy_(master)


def _move_gradient(parameter: nn.Parameter, master: nn.Parameter) -> None:
    """Add each gradient that ``parameter`` receives to ``master``'s, and free it."""

    def move(parameter: Tensor) -> None:
        gradient = parameter.grad
        parameter.grad = None
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad += gradient

    parameter.register_post_accumulate_grad_hook(move)
