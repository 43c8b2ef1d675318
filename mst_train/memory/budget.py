"""Whether a run can fit its device at all, from its dimensions alone.

What is added up here is certainly alive at one moment of every step, so a run that is refused could
not have worked. A run that passes may still be too large by what is not counted.
"""

import os
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


def minimum_bytes(config: Config, parameters: int) -> dict[str, int]:
    """Bytes that are alive together at one moment of every step, by part.

    ``parameters`` is the model's number of parameters. The moment is the larger of two: the end of
    the forward, when all kept activations exist, and the optimizer's update, when all gradients do.
    """
    states = {name: size * parameters for name, size in STATE_BYTES[config.precision].items()}
    end_of_forward = states | _kept_activations(config)
    if config.train.accumulation_steps == 1:
        del end_of_forward["gradients"]
    return max(end_of_forward, states, key=lambda parts: sum(parts.values()))


def _kept_activations(config: Config) -> dict[str, int]:
    model, policy = config.model, config.memory.policy
    element = 4 if config.precision == "fp32" else 2
    tokens = config.train.micro_batch_size * config.data.sequence_length
    width = model.hidden_size
    if policy == "vanilla":
        heads = 2 * model.num_heads + 2 * model.num_kv_heads
        width += heads * model.head_dim + 4 * model.intermediate_size
    kept = {"kept activations": model.num_layers * tokens * width * element}
    if policy != "mst":
        kept["logits in fp32"] = tokens * model.vocab_size * 4
    return kept


def require_fit(config: Config, parameters: int, device: torch.device) -> None:
    """Raise UserError where the run certainly does not fit its device or its budget."""
    available = device_bytes(device)
    budget = config.memory.device_budget_gib
    limit = available if budget is None else min(available, int(budget * GIB))
    parts = minimum_bytes(config, parameters)
    needed = sum(parts.values())
    if needed <= limit:
        return
    listed = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parts.items())
    whose = f"the {device.type} device has {available / GIB:.2f} GiB"
    if limit < available:
        whose = f"memory.device_budget_gib allows {limit / GIB:.2f} GiB"
    raise UserError(
        f"{config.run.name} does not fit: it needs at least {needed / GIB:.2f} GiB ({listed}) and "
        f"{whose}. {_advice(config, parts, limit)}"
    )


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
    kept = sum(_kept_activations(config).values())
    states = sum(parts.values()) - (kept if "kept activations" in parts else 0)
    if states > limit:
        precision = "" if config.precision == "bf16" else " or precision=bf16"
        return (
            f"The weights and their states alone are too large: take a larger device, a smaller "
            f"model{precision}."
        )
    if config.memory.policy != "mst":
        return "Set memory.policy=mst or a smaller data.sequence_length."
    longest = config.data.sequence_length * (limit - states) // kept
    return f"Set data.sequence_length below {longest} or take a larger device."
