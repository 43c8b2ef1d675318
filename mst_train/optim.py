"""AdamW: its learning-rate schedule, the weights' precision, where and when weights are updated.

    Optimizer              on the device, after the backward
    InBackwardOptimizer    on the device, each parameter as soon as its gradient is there
    HostOptimizer          on the host, after the backward; the device holds no states

All three are used in the same way and save the same state, so a run may change from one to another
at a checkpoint:

    optimizer.begin_step(rate)
    loss.backward()
    norm = optimizer.gradient_norm()
    optimizer.clip(max_norm, norm)
    optimizer.step()
"""

import fcntl
import importlib.util
import logging
import math
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from mst_train.config import OptimizerConfig
from mst_train.errors import TrainingError, UserError
from mst_train.memory.tracker import HOST_RANGE

log = logging.getLogger(__name__)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step ``step`` (1 to ``steps``): linear warm-up, then half a cosine."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * cosine)


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, master_weights: bool
) -> "Optimizer":
    """The optimizer that ``optimizer.in_backward`` and ``optimizer.offload`` ask for.

    Raises UserError where DeepSpeed is asked for and cannot be used.
    """
    if config.in_backward:
        return InBackwardOptimizer(model, config, master_weights=master_weights)
    if config.offload == "host":
        return HostOptimizer(model, config, master_weights=master_weights)
    return Optimizer(model, config, master_weights=master_weights)


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

    def begin_step(self, rate: float) -> None:
        """Before the step's first backward: the learning rate of the step."""
        for group in self._adamw.param_groups:
            group["lr"] = rate

    def gradients(self) -> list[Tensor]:
        """The gradient as it has come in so far, in the weights' order."""
        return [w.grad for w in self._weights.values() if w.grad is not None]

    def gradient_norm(self) -> Tensor:
        """The global norm of the step's gradient: a scalar, fp32 at least."""
        return _norm(_norm([gradient]) for gradient in self.gradients())

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scale the gradient, whose global norm is ``norm``, to at most ``max_norm``."""
        nn.utils.clip_grads_with_norm_(self._weights.values(), max_norm, norm)

    def abandon_step(self) -> None:
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


class InBackwardOptimizer(Optimizer):
    """AdamW that updates each parameter in the backward, as soon as its gradient is there.

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
        return _norm(self._norms[name] for name in self._weights if name in self._norms)

    def clip(self, max_norm: float, norm: Tensor) -> None:
        raise RuntimeError("weights that are updated in the backward leave nothing to clip")

    def abandon_step(self) -> None:
        super().abandon_step()
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
        self._norms[name] = _norm([weight.grad])
        self._adamw.step()  # of this weight: it alone has a gradient
        weight.grad = None
        self._write_back([name])


class HostOptimizer(Optimizer):
    """AdamW on the host's processors, by DeepSpeed's CPUAdam: ZeRO-Offload, Ren et al. 2021.

    Gradients move to the host as the backward produces them, and add up there in fp32; updated
    weights are copied back. The numbers are those of ``Optimizer`` in fp32 but for the rounding of
    each operation.

    Memory: nothing on the device but one gradient at a time; on the host 16 bytes per parameter
    (fp32 weights, gradients and two states). On CUDA, weights and gradients are pinned, for which
    torch rounds each of them up to a power of two.

    Raises UserError where DeepSpeed is not installed or cannot build CPUAdam.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, *, master_weights: bool) -> None:
        super().__init__(model, config, master_weights=master_weights)
        self._gradients = {n: _host_copy(w) for n, w in self._parameters.items()}
        self._device = next(iter(self._parameters.values())).device

    def begin_step(self, rate: float) -> None:
        """Before the step's first backward: the learning rate of the step.

        CPUAdam multiplies the powers of beta in its bias correction up from step to step, and would
        not continue a resumed run to the last digit. So it is told to correct nothing, and gets the
        correction from here. With c1 = 1 - beta1^t and c2 = 1 - beta2^t,

            rate / c1 * m / (sqrt(v / c2) + epsilon)
                = rate * sqrt(c2) / c1 * m / (sqrt(v) + epsilon * sqrt(c2)).
        """
        for group in self._adamw.param_groups:
            (weight,) = group["params"]
            step = self._adamw.state.get(weight, {}).get("step", 0) + 1
            first = 1 - self._config.beta1**step
            second = math.sqrt(1 - self._config.beta2**step)
            decay = self._config.weight_decay if weight.ndim > 1 else 0.0
            group["lr"] = rate * second / first
            group["eps"] = self._config.epsilon * second
            group["weight_decay"] = decay * first / second  # CPUAdam multiplies it by "lr"

    def gradient_norm(self) -> Tensor:
        self._wait()
        return super().gradient_norm()

    @torch.no_grad()
    def step(self) -> None:
        self._wait()
        with record_function(HOST_RANGE):
            super().step()

    def _weight(self, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(_host_copy(parameter))

    def _build_adamw(self) -> torch.optim.Optimizer:
        return _cpu_adam(
            # One group each, because its bias correction is its own.
            [{"params": [weight]} for weight in self._weights.values()],
            betas=(self._config.beta1, self._config.beta2),
            bias_correction=False,
            adamw_mode=True,
        )

    def _state(self, weight: Tensor, saved: dict[str, Tensor]) -> dict[str, Any]:
        with record_function(HOST_RANGE):
            return super()._state(weight, saved) | {"step": int(saved["step"])}

    def _takes_gradients(self) -> bool:
        return True

    def _receive(self, name: str, gradient: Tensor) -> None:
        weight = self._weights[name]
        if weight.grad is None:
            weight.grad = self._gradients[name]
            weight.grad.copy_(gradient, non_blocking=True)
        else:
            self._wait()
            with record_function(HOST_RANGE):
                weight.grad += gradient.to(weight.device)

    def _wait(self) -> None:
        """Until the gradients that are on their way have arrived."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of tensors (or of their norms) taken together: a scalar, fp32 at least."""
    norms = [
        torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32))
        for t in tensors
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy in fp32 on the host, pinned where the tensor is on CUDA."""
    with record_function(HOST_RANGE):
        home = "meta" if tensor.is_meta else "cpu"  # a simulated step has no memory there either
        pinned = tensor.is_cuda
        copy = torch.empty(tensor.shape, dtype=torch.float32, device=home, pin_memory=pinned)
    return copy.copy_(tensor.detach())


def _cpu_adam(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """DeepSpeed's CPUAdam, compiled the first time (about a minute)."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "optimizer.offload=host needs the package deepspeed, which is not installed: "
            "pip install 'mst-train[distributed]', or set optimizer.offload=none"
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        with _building_alone("cpu_adam"):
            return DeepSpeedCPUAdam(groups, **options)
    except Exception as error:
        cause = str(error.__cause__ or error).strip().splitlines()
        raise UserError(
            f"optimizer.offload=host cannot be used, because DeepSpeed cannot build its CPUAdam "
            f"here ({cause[0] if cause else type(error).__name__}): install a C++ compiler and "
            f"ninja, or set optimizer.offload=none"
        ) from error


@contextmanager
def _building_alone(name: str) -> Iterator[None]:
    """Around what makes torch build the extension ``name``, if it is not there yet.

    Torch waits for ever for a file that a process leaves when it is killed in a build. This lock
    ends with its process: while it is held, such a file, in a folder of mst_train's, is nobody's.
    """
    from torch.utils.cpp_extension import get_default_build_root

    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    python = sysconfig.get_config_var("SOABI")
    root = Path(given or get_default_build_root()) / f"mst_train-{python}-{torch.__version__}"
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        if not (folder / f"{name}.so").exists():
            log.info("building DeepSpeed's %s, once: about a minute", name)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(root)
        try:
            yield
        finally:
            del os.environ["TORCH_EXTENSIONS_DIR"]
            if given is not None:
                os.environ["TORCH_EXTENSIONS_DIR"] = given
