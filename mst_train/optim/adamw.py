"""AdamW over a model's parameters, on their device."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mst_train.config import OptimizerConfig
from mst_train.errors import UserError


def build_adamw(
    matrices: Sequence[Tensor], others: Sequence[Tensor], config: OptimizerConfig
) -> torch.optim.AdamW:
    """Torch's AdamW, with weight decay for matrices alone; each step sets its learning rate."""
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


class Optimizer:
    """AdamW over a model's parameters, on their device, after the backward.

    Args:
        model: its parameters that require a gradient are updated, whatever their type.
        config: ``learning_rate`` is not read: each step is given its own.
        master_weights: update fp32 copies and round them into the model after each step. Gradients
            then move to the copies as the backward produces them, so that micro-batches add up in
            fp32 and the model's own gradients never exist together.

    Memory: all gradients and two states, in the parameters' type; with ``master_weights`` all three
    in fp32, and the fp32 copies.
    """

    after_bad_gradient = "the weights were not updated"
    """What a gradient that is not finite has done, known once ``gradient_norm`` is."""

    survives_bad_gradient = True
    """Whether weights and states are then as they were before the step."""

    remedies = (
        "a lower optimizer.learning_rate, a longer optimizer.warmup_steps or a smaller "
        "optimizer.max_grad_norm"
    )

    def __init__(self, model: nn.Module, config: OptimizerConfig, *, master_weights: bool) -> None:
        self._config = config
        self._has_masters = master_weights
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._weights = {n: self._weight(p) for n, p in self._parameters.items()}
        """What AdamW updates: the parameters themselves or copies of them, by name."""
        self._adamw = self._build_adamw()
        if self._takes_gradients():
            for name, parameter in self._parameters.items():
                parameter.register_post_accumulate_grad_hook(partial(self._take, name))

    def set_learning_rate(self, rate: float) -> None:
        """Before the step's first backward: the learning rate of the step."""
        for group in self._adamw.param_groups:
            group["lr"] = rate

    def gradients(self) -> list[Tensor]:
        """The gradient as it has come in so far, in the weights' order."""
        return [w.grad for w in self._weights.values() if w.grad is not None]

    def gradient_norm(self) -> Tensor:
        """The global norm of the step's gradient: a scalar, fp32 at least."""
        return global_norm(global_norm([gradient]) for gradient in self.gradients())

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scale the gradient, whose global norm is ``norm``, to at most ``max_norm``."""
        nn.utils.clip_grads_with_norm_(self._weights.values(), max_norm, norm)

    def zero_grad(self) -> None:
        """Forget the gradient of a step that was not finished."""
        self._adamw.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights and forget the gradient: the step is done."""
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._write_back(self._parameters)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """For each parameter, by name: AdamW's step, exp_avg and exp_avg_sq, and its master weight.

        The first three are missing before the first update, the master where there are none. The
        tensors are those in use, not copies, except for step (a scalar, fp32).
        """
        saved: dict[str, dict[str, Tensor]] = {}
        for name, weight in self._weights.items():
            state = self._adamw.state.get(weight, {})
            saved[name] = {key: state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}
            if state:
                saved[name]["step"] = torch.tensor(float(state["step"]))
            if self._has_masters:
                saved[name]["master"] = weight.detach()
        return saved

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Take over a state saved by any of the optimizers; the model has its weights already.

        Raises UserError where it belongs to other parameters.
        """
        masters = all("master" in state for state in saved.values())
        if saved.keys() != self._weights.keys() or masters != self._has_masters:
            raise UserError(
                "the optimizer's state in the checkpoint belongs to other parameters or another "
                "precision than this run's: start anew with another run.dir"
            )
        for name, weight in self._weights.items():
            weight.copy_(saved[name].get("master", self._parameters[name]))
            if "step" in saved[name]:
                self._adamw.state[weight] = self._state(weight, saved[name])

    # --- what differs between the three -------------------------------------------------------

    def _weight(self, parameter: nn.Parameter) -> nn.Parameter:
        if self._has_masters:
            return nn.Parameter(parameter.detach().to(torch.float32, copy=True))
        return parameter

    def _build_adamw(self) -> torch.optim.Optimizer:
        weights = self._weights.values()
        return build_adamw(
            [w for w in weights if w.ndim > 1], [w for w in weights if w.ndim <= 1], self._config
        )

    def _state(self, weight: Tensor, saved: dict[str, Tensor]) -> dict[str, Any]:
        """A state as ``_adamw`` holds it."""
        return {
            "step": saved["step"].to(weight.device, copy=True),
            "exp_avg": saved["exp_avg"].to(weight, copy=True),
            "exp_avg_sq": saved["exp_avg_sq"].to(weight, copy=True),
        }

    def _takes_gradients(self) -> bool:
        """Whether gradients leave the parameters as the backward produces them."""
        return self._has_masters

    def _receive(self, name: str, gradient: Tensor) -> None:
        """In the backward: a gradient that ``parameter.grad`` holds no longer."""
        weight = self._weights[name]
        if weight.grad is None:
            weight.grad = gradient.to(weight.dtype)
        else:
            weight.grad += gradient

    # --- what does not ------------------------------------------------------------------------

    @torch.no_grad()
    def _take(self, name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self._receive(name, gradient)

    def _write_back(self, names: Iterable[str]) -> None:
        """Round the updated weights into the model, where they are copies."""
        for name in names:
            parameter, weight = self._parameters[name], self._weights[name]
            if weight is not parameter:
                parameter.copy_(weight, non_blocking=True)


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of tensors (or of their norms) taken together: a scalar, fp32 at least."""
    norms = [
        torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32))
        for t in tensors
    ]
    return torch.linalg.vector_norm(torch.stack(norms))
