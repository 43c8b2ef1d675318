"""ZeRO: optimizer states, gradients and weights shared out over all processes (Rajbhandari et al.
2020), by DeepSpeed.

DeepSpeed divides gradients by the number of processes. All of them hold the same weights and
different tokens, whichever sequence and rows these are from, and their losses are parts of one
sum: so the loss is multiplied by that number before its backward. DeepSpeed's division by the
number of micro-batches, and its clipping, are not used.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mst_train.config import Config, ModelConfig
from mst_train.deepspeed_adapter import ZeroParts, full_shape, load
from mst_train.distributed.topology import Topology
from mst_train.engine.protocol import State, own_parameters
from mst_train.errors import UserError
from mst_train.model.flops import parameter_count
from mst_train.optim import Optimizer, build_adamw

STATES = ("exp_avg", "exp_avg_sq")


class ZeroEngine:
    """``engine.Engine`` under ZeRO.

    Args:
        model: the same on all processes; its ``blocks``, each as a whole, are what stage 3 puts
            together and takes apart.
        config: ``parallel.zero_stage`` 1 shares out optimizer states and fp32 weights, 2 the summed
            gradients too, 3 the weights too. ``precision`` is fp32 or bf16_master. With
            ``optimizer.offload=host`` a process's part of states, fp32 weights and gradients is on
            the host, and is updated there.

    Gradients add up and are summed in fp32.
    """

    after_bad_gradient = Optimizer.after_bad_gradient
    survives_bad_gradient = True
    remedies = Optimizer.remedies

    def __init__(self, model: nn.Module, config: Config, topology: Topology) -> None:
        deepspeed = load(topology.device)
        self.topology = topology
        self._model = model
        self._has_masters = config.precision == "bf16_master"
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._shares_weights = config.parallel.zero_stage == 3
        if self._shares_weights:
            for block in model.blocks:  # type: ignore[union-attr]
                deepspeed.utils.set_z3_leaf_module(block, True)
        parameters = self._parameters.values()
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_adamw(
                [p for p in parameters if len(full_shape(p)) > 1],
                [p for p in parameters if len(full_shape(p)) <= 1],
                config.optimizer,
            ),
            config=_settings(config, topology),
            dist_init_required=False,
        )
        self._parts = ZeroParts(
            self._engine,
            shares_weights=self._shares_weights,
            on_host=config.optimizer.offload == "host",
        )

    def __call__(self, *arguments: Any) -> Any:
        return self._engine(*arguments)

    def set_learning_rate(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.topology.world, scale_wrt_gas=False)

    def gradient_norm(self) -> Tensor:
        squares = [
            torch.linalg.vector_norm(part, dtype=torch.float64).square()
            for part in self._parts.gradients()
        ]
        (total,) = self.topology.total([sum(squares, start=torch.zeros(())).item()])
        return torch.tensor(math.sqrt(total))

    def clip(self, max_norm: float, norm: Tensor) -> None:
        scale = max_norm / (norm.item() + 1e-6)  # as torch.nn.utils.clip_grads_with_norm_
        if scale < 1:
            for part in self._parts.gradients():
                part.mul_(scale)

    def step(self) -> None:
        self._engine.step()

    def zero_grad(self) -> None:
        self._parts.forget_gradients()

    def state(self) -> tuple[dict[str, Tensor], State]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        saved: State = {}
        own = own_parameters(self._model, self.topology)
        step = self._parts.step_count()
        if step is not None:
            self._parts.link_states()
        for name, parameter in self._parameters.items():
            parts = {}
            if step is not None:
                parts = {key: safe_get_full_optimizer_state(parameter, key) for key in STATES}
                parts["step"] = torch.tensor(step)
            if self._has_masters:
                parts["master"] = safe_get_full_fp32_param(parameter)
            if name in own:
                saved[name] = {key: part.cpu() for key, part in parts.items()}
        return self._weights(own), saved

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], state: State) -> None:
        masters = all("master" in parts for parts in state.values())
        if state.keys() != self._parameters.keys() or masters != self._has_masters:
            raise UserError(
                "the optimizer's state in the checkpoint belongs to other parameters or another "
                "precision than this run's: start anew with another run.dir"
            )
        steps = [parts["step"] for parts in state.values() if "step" in parts]
        if steps:
            self._parts.make_states(float(steps[0]), STATES)
            self._parts.link_states()
        for name, parameter in self._parameters.items():
            parts = state[name]
            self._parts.set(parameter, parts.get("master", weights[name]), None, self.topology.rank)
            if "step" in parts:
                for key in STATES:
                    self._parts.set(parameter, parts[key], key, self.topology.rank)
        if self._shares_weights:
            self._parts.round_weights()
        else:
            self._model.load_state_dict(weights)

    def _weights(self, own: set[str]) -> dict[str, Tensor]:
        """The whole weights of these names.

        Copies, because DeepSpeed's are views of larger arrays, which would be saved with them.
        """
        from deepspeed import zero

        copies: dict[nn.Parameter, Tensor] = {}
        weights = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            with zero.GatheredParameters([parameter], enabled=self._shares_weights):
                if name in own:
                    if parameter not in copies:
                        copies[parameter] = parameter.detach().cpu().clone()
                    weights[name] = copies[parameter]
        return weights


def partition_weights(config: Config, topology: Topology) -> Callable[[nn.Module], object]:
    """Leaves each process its part of a module's weights (stage 3)."""
    deepspeed = load(topology.device)
    settings = _settings(config, topology)
    return lambda module: deepspeed.zero.Init(module=module, config_dict_or_path=settings)


def whole_parameter(parameter: nn.Parameter) -> AbstractContextManager[object]:
    """Where a parameter is whole on all processes, and takes the first one's values (stage 3)."""
    from deepspeed import zero

    whole: AbstractContextManager[object] = zero.GatheredParameters([parameter], modifier_rank=0)
    return whole


def _settings(config: Config, topology: Topology) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, with ``parallel.deepspeed`` laid over it."""
    return _laid_over(_own_settings(config, topology), config.parallel.deepspeed)


def reduce_bucket_size(model: ModelConfig) -> int:
    """Elements of gradients that are summed at once: DeepSpeed's own number, or all there are."""
    return min(5 * 10**8, parameter_count(model))


def _laid_over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        inner = merged.get(name)
        if isinstance(value, Mapping) and isinstance(inner, dict):
            value = _laid_over(inner, value)
        merged[name] = value
    return merged


def _own_settings(config: Config, topology: Topology) -> dict[str, Any]:
    on_gpu = topology.device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": config.parallel.zero_stage,
        "overlap_comm": on_gpu,
        "reduce_bucket_size": reduce_bucket_size(config.model),
        "stage3_param_persistence_threshold": 0,  # small ones come with their blocks
        "memory_efficient_linear": False,  # it would replace torch's for all
    }
    if config.optimizer.offload == "host":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.accumulation_steps,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW, there too
        "bf16": {"enabled": config.precision == "bf16_master"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": 0.0,  # its default is 1
        "steps_per_print": 10**9,
    }
