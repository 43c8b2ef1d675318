"""AdamW on the host: the device holds no states."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from mst_train.config import OptimizerConfig
from mst_train.deepspeed_adapter import cpu_adam
from mst_train.mst.host_memory import HostMemory
from mst_train.optim.adamw import Optimizer
from mst_train.ranges import HOST_RANGE


class HostOptimizer(Optimizer):
    """AdamW on the host's processors, by DeepSpeed's CPUAdam: ZeRO-Offload, Ren et al. 2021.

    Gradients move to the host as the backward produces them, and add up there in fp32; updated
    weights are copied back. The numbers are those of ``Optimizer`` in fp32 but for the rounding of
    each operation.

    Memory: nothing on the device but one gradient at a time; on the host 16 bytes per parameter
    (fp32 weights, gradients and two states). On CUDA, weights and gradients are pinned.

    Raises UserError where DeepSpeed is not installed or cannot build CPUAdam.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, *, master_weights: bool) -> None:
        self._device = next(model.parameters()).device
        self._memory = HostMemory(pinned=self._device.type == "cuda")
        super().__init__(model, config, master_weights=master_weights)
        self._gradients = {n: self._empty(w) for n, w in self._parameters.items()}

    def set_learning_rate(self, rate: float) -> None:
        """Before the step's first backward: the learning rate of the step.

        CPUAdam multiplies the powers of beta in its bias correction up from step to step, and would
        not continue a resumed run to the last digit. So it is told to correct nothing, and gets the
        correction from here. With c1 = 1 - beta1^t and c2 = 1 - beta2^t,

            rate / c1 * m / (sqrt(v / c2) + epsilon)
                = rate * sqrt(c2) / c1 * m / (sqrt(v) + epsilon * sqrt(c2)).
        """
        (adamw,) = self._optimizers
        for group in adamw.param_groups:
            (weight,) = group["params"]
            step = adamw.state.get(weight, {}).get("step", 0) + 1
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
        return nn.Parameter(self._empty(parameter).copy_(parameter.detach()))

    def _empty(self, parameter: Tensor) -> Tensor:
        """On the host, in fp32."""
        home = "meta" if parameter.is_meta else "cpu"  # a simulated step has no memory there either
        return self._memory.empty(parameter.shape, torch.float32, home)

    def _build_adamw(self, weights: Sequence[Tensor]) -> torch.optim.Optimizer:
        return cpu_adam(
            # One group each, because its bias correction is its own.
            [{"params": [weight]} for weight in weights],
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
            with record_function(HOST_RANGE):
                weight.grad += gradient.to(weight.device)  # waits for the first one as well

    def _wait(self) -> None:
        """Until the gradients that are on their way have arrived."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
