"""Whether a run can fit its device and its host at all, from its dimensions alone.

What is added up here is certainly alive at one moment of every step but the first, so a run that is
refused could not have worked. A run that passes may still be too large by what is not counted.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from mst_train.config import Config
from mst_train.errors import UserError

GIB = 2**30

STATE_BYTES = {
    "fp32": {"weights": 4, "gradients": 4, "optimizer states": 8},
    "bf16": {"weights": 2, "gradients": 2, "optimizer states": 4},
    "bf16_master": {"weights": 2, "gradients": 4, "optimizer states": 12},
}
"""Bytes per parameter; fp32 master weights count as optimizer states."""

HOST_STATE_BYTES = {"gradients on the host": 4, "optimizer states on the host": 12}
"""Bytes per parameter with optimizer.offload=host: fp32, weights counted as states."""


def minimum_bytes(config: Config, parameters: int) -> dict[str, int]:
    """Bytes that are alive together on the device at one moment of every step, by part.

    ``parameters`` is the model's number of parameters. The moment is the larger of two: the end of
    the forward, when all kept activations exist, and the optimizer's update, when all gradients do
    (unless each parameter is updated in the backward, or gradients move to the host).
    """
    sizes = STATE_BYTES[config.precision]
    states = {name: size * parameters for name, size in sizes.items()}
    if config.optimizer.offload == "host":
        del states["gradients"], states["optimizer states"]
    elif config.optimizer.in_backward:
        del states["gradients"]
    end_of_forward = states | _logits(config)
    if config.memory.offload == "none":
        end_of_forward |= {"kept activations": _kept_activations(config)}
    if config.train.accumulation_steps == 1:
        end_of_forward.pop("gradients", None)
    return max(end_of_forward, states, key=lambda parts: sum(parts.values()))


def minimum_host_bytes(config: Config, parameters: int) -> dict[str, int]:
    """Bytes that are alive together in the host's memory for what is offloaded, by part."""
    parts = {}
    if config.optimizer.offload == "host":
        parts = {name: size * parameters for name, size in HOST_STATE_BYTES.items()}
    if config.memory.offload == "host":
        parts["kept activations on the host"] = _kept_activations(config)
    return parts


def _kept_activations(config: Config) -> int:
    """What the blocks keep between forward and backward."""
    model, policy = config.model, config.memory.policy
    element = 4 if config.precision == "fp32" else 2
    query_size = model.num_heads * model.head_dim
    bytes_per_token = model.hidden_size * element
    if policy == "vanilla":
        width = 2 * query_size + 2 * model.num_kv_heads * model.head_dim
        bytes_per_token += (width + 4 * model.intermediate_size) * element
    elif policy == "mst" and config.memory.keep_attention and _attention_is_a_kernel(config):
        log_sum_exp = 4 * model.num_heads
        bytes_per_token += query_size * element + log_sum_exp
    return model.num_layers * _tokens(config) * bytes_per_token


def _attention_is_a_kernel(config: Config) -> bool:
    """Whether attention certainly has a result to keep (see model/attention.py)."""
    if config.kernel.attention == "auto":
        return config.precision != "fp32"  # in fp32 it depends on the device
    return config.kernel.attention in ("cpu", "torch_flash", "cudnn")


def _logits(config: Config) -> dict[str, int]:
    if config.memory.policy == "mst":
        return {}
    return {"logits in fp32": _tokens(config) * config.model.vocab_size * 4}


def _tokens(config: Config) -> int:
    return config.train.micro_batch_size * config.data.sequence_length


def require_fit(config: Config, parameters: int, device: torch.device) -> None:
    """Raise UserError where the run certainly fits not its device, its host or a budget of them."""
    problems = [
        *_device_problems(config, parameters, device),
        *_host_problems(config, parameters, device),
    ]
    if problems:
        raise UserError(problems)


def _device_problems(config: Config, parameters: int, device: torch.device) -> Iterator[str]:
    available = device_bytes(device)
    budget = config.memory.device_budget_gib
    limit = available if budget is None else min(available, int(budget * GIB))
    parts = minimum_bytes(config, parameters)
    if sum(parts.values()) <= limit:
        return
    whose = f"the {device.type} device has {available / GIB:.2f} GiB"
    if limit < available:
        whose = f"memory.device_budget_gib allows {limit / GIB:.2f} GiB"
    yield (
        f"{config.run.name} does not fit: it needs at least {_listed(parts)} and {whose}. "
        f"{_advice(config, parts, limit)}"
    )


def _host_problems(config: Config, parameters: int, device: torch.device) -> Iterator[str]:
    parts = minimum_host_bytes(config, parameters)
    if not parts:
        return
    available, budget = device_bytes(torch.device("cpu")), config.memory.host_budget_gib
    kept = parts.get("kept activations on the host", 0)
    if device.type == "cpu":  # one memory for both
        parts |= minimum_bytes(config, parameters)
    if budget is not None and kept > budget * GIB:
        yield (
            f"{config.run.name} does not fit: memory.offload=host needs at least "
            f"{kept / GIB:.2f} GiB of host memory and memory.host_budget_gib allows {budget:.2f}. "
            f"Raise it, or set {_ways_to_keep_less(config)}."
        )
    if sum(parts.values()) > available:
        ways = [_ways_to_keep_less(config)] if kept else []
        ways += ["optimizer.offload=none"] if config.optimizer.offload == "host" else []
        yield (
            f"{config.run.name} does not fit: with what is offloaded it needs at least "
            f"{_listed(parts)} of host memory and this machine has {available / GIB:.2f} GiB. Set "
            f"{' or '.join(ways)}."
        )


def _listed(parts: dict[str, int]) -> str:
    listed = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parts.items())
    return f"{sum(parts.values()) / GIB:.2f} GiB ({listed})"


def _ways_to_keep_less(config: Config) -> str:
    ways = ["a smaller data.sequence_length"]
    if config.memory.keep_attention and _attention_is_a_kernel(config):
        ways.append("memory.keep_attention=false")
    return " or ".join(ways)


def device_bytes(device: torch.device) -> int:
    """All memory of the device; for the CPU, what this machine or container has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        container = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no container, or its limit is the word "max"
        return machine
    return min(machine, container)


def _advice(config: Config, parts: dict[str, int], limit: int) -> str:
    activations = {"kept activations", "logits in fp32"}
    states = sum(size for name, size in parts.items() if name not in activations)
    if states > limit:
        ways = ["take a larger device", "a smaller model"]
        if config.precision != "bf16" and config.optimizer.offload == "none":
            ways.append("precision=bf16")
        if "gradients" in parts and config.train.accumulation_steps == 1:
            ways.append("optimizer.in_backward=true with optimizer.max_grad_norm=null")
        if config.optimizer.offload == "none":
            bf16 = " with precision=bf16_master" if config.precision == "bf16" else ""
            ways.append(f"optimizer.offload=host{bf16}")
        return (
            f"The weights and their states alone are too large: {', '.join(ways[:-1])} or "
            f"{ways[-1]}."
        )
    if config.memory.policy != "mst":
        return "Set memory.policy=mst or a smaller data.sequence_length."
    kept = parts["kept activations"]
    longest = config.data.sequence_length * (limit - states) // kept
    return (
        f"Set data.sequence_length below {longest} or memory.offload=host, or take a larger device."
    )
