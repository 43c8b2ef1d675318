"""A model's parameters updated on their device: all by AdamW, or some by Muon."""

from collections.abc import Container, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mst_train.config import OptimizerConfig
from mst_train.errors import UserError
from mst_train.optim.muon import block_matrices, build_muon

ADAMW_STATES = ("step", "exp_avg", "exp_avg_sq")
MUON_STATES = ("momentum_buffer",)
"""What torch keeps of a parameter once it has been updated, by its own names."""


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

    With ``optimizer.name=muon`` the blocks' matrices are Muon's.

    Args:
        model: its parameters that require a gradient are updated, whatever their type.
        config: ``learning_rate`` is not read: each step is given its own.
        master_weights: update fp32 copies and round them into the model after each step. Gradients
            then move to the copies as the backward produces them, so that micro-batches add up in
            fp32 and the model's own gradients never exist together.

    Memory: all gradients and two states (one where Muon updates), in the parameters' type; with
    ``master_weights`` all of them in fp32, and the fp32 copies. Muon makes one matrix after another
    orthogonal, which takes some three times the largest while it steps.
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
        """What is updated: the parameters themselves or copies of them, by name."""
        self._updates = self._build_updates(block_matrices(model) if config.name == "muon" else [])
        """What updates each weight, by name."""
        self._optimizers = [*dict.fromkeys(self._updates.values())]
        if self._takes_gradients():
            for name, parameter in self._parameters.items():
                parameter.register_post_accumulate_grad_hook(partial(self._take, name))

    def set_learning_rate(self, rate: float) -> None:
        """Before the step's first backward: the learning rate of the step."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
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
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights and forget the gradient: the step is done."""
        for optimizer in self._optimizers:
            optimizer.step()
        self.zero_grad()
        self._write_back(self._parameters)

    def state_names(self, name: str) -> tuple[str, ...]:
        """What is kept of a parameter once it has been updated, besides its master weight."""
        of_muon = isinstance(self._updates[name], torch.optim.Muon)
        return MUON_STATES if of_muon else ADAMW_STATES

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """For each parameter, by name: its states (``state_names``), and its master weight.

        The states are missing before the first update, the master where there are none. The
        tensors are those in use, not copies, except for AdamW's step (a scalar, fp32).
        """
        saved: dict[str, dict[str, Tensor]] = {}
        for name, weight in self._weights.items():
            state = self._updates[name].state.get(weight, {})
            saved[name] = {key: state[key] for key in self.state_names(name) if key in state}
            if "step" in state:
                saved[name]["step"] = torch.tensor(float(state["step"]))
            if self._has_masters:
                saved[name]["master"] = weight.detach()
        return saved

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Take over a state saved wherever the update is; the model has its weights already.

        Raises UserError where it belongs to other parameters or another optimizer.
        """
        masters = all("master" in state for state in saved.values())
        if (
            saved.keys() != self._weights.keys()
            or masters != self._has_masters
            or not all(self._has_states(name, state) for name, state in saved.items())
        ):
            raise UserError(
                "the optimizer's state in the checkpoint belongs to other parameters, another "
                "precision or another optimizer than this run's: start anew with another run.dir"
            )
        for name, weight in self._weights.items():
            state = {key: saved[name][key] for key in self.state_names(name) if key in saved[name]}
            weight.copy_(saved[name].get("master", self._parameters[name]))
            if state:
                self._updates[name].state[weight] = self._state(weight, state)

    # --- what differs between the three -------------------------------------------------------

    def _weight(self, parameter: nn.Parameter) -> nn.Parameter:
        if self._has_masters:
            return nn.Parameter(parameter.detach().to(torch.float32, copy=True))
        return parameter

    def _build_adamw(self, weights: Sequence[Tensor]) -> torch.optim.Optimizer:
        return build_adamw(
            [w for w in weights if w.ndim > 1], [w for w in weights if w.ndim <= 1], self._config
        )

    def _state(self, weight: Tensor, saved: dict[str, Tensor]) -> dict[str, Any]:
        """A state as torch's optimizer holds it."""
        return {
            key: state.to(weight.device if key == "step" else weight, copy=True)
            for key, state in saved.items()
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

    def _build_updates(self, of_muon: Container[str]) -> dict[str, torch.optim.Optimizer]:
        muon = {n: w for n, w in self._weights.items() if n in of_muon}
        adamw = {n: w for n, w in self._weights.items() if n not in of_muon}
        updates = dict.fromkeys(adamw, self._build_adamw([*adamw.values()]))
        if muon:
            updates |= dict.fromkeys(muon, build_muon([*muon.values()], self._config))
        return updates

    def _has_states(self, name: str, state: dict[str, Tensor]) -> bool:
        """Whether a saved state is one of this parameter, updated or not."""
        return state.keys() - {"master"} in (set(), set(self.state_names(name)))

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
