"""Whole training steps of one model under each memory policy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mst_train.bench.config import BenchConfig
from mst_train.bench.measure import Variant, collect_garbage, measure
from mst_train.bench.progress import progress
from mst_train.bench.workload import Batch, build, chosen, lengths, loss_problems, random_batch
from mst_train.config import ALL, KeepConfig, MemoryConfig
from mst_train.memory.devices import this_device
from mst_train.model import Policy, Transformer
from mst_train.model.flops import training_flops
from mst_train.mst import Offload
from mst_train.optim import Optimizer, build_optimizer
from mst_train.precision import weight_type
from mst_train.units import GIB

VARIANTS = ("vanilla", "recompute", "mst", "mst_without_keeping", "mst_offload")
HOST_SHARE = 0.85
"""Of the host's memory, what a variant that offloads may take."""

SHORT = ("vanilla", "recompute", "mst")
"""Of these, those that are compared where lengths do not need the method."""


def run(config: BenchConfig, device: torch.device) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of measurements, and what is wrong with them. Short steps are measured more often."""
    short = config.bench.kind == "short"
    wanted = chosen(config, SHORT if short else VARIANTS)
    model = build(config, device)
    optimizer = _optimizer(config, model)

    def variants(batch: Batch) -> list[Variant]:
        return [_variant(name, model, batch, optimizer, config) for name in wanted]

    if not short:
        return measure_steps(config, device, len(wanted), variants)
    longest = max(lengths(config))
    often = {length: max(min(longest // length // 2, 8), 1) for length in lengths(config)}
    return measure_steps(config, device, len(wanted), variants, often.__getitem__)


def measure_steps(
    config: BenchConfig,
    device: torch.device,
    count: int,
    variants: Callable[[Batch], list[Variant]],
    often: Callable[[int], int] = lambda length: 1,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows for ``count`` variants of a step on random tokens, with speed and utilisation.

    A sequence of a length is measured ``often(length)`` times the configured repetitions. Returns
    the rows, and what is wrong with their losses.
    """
    dtype, rate = weight_type(config.precision), this_device(device).bf16_flops
    repetitions = {n: config.bench.repetitions * often(n) for n in lengths(config)}
    rows, problems = [], []
    with progress(count * sum(1 + r for r in repetitions.values())) as advance:
        for length in lengths(config):
            batch = random_batch(config, length, device)
            found = measure(variants(batch), repetitions[length], device, advance=advance)
            flops = training_flops(config.model, length)
            for measurement in found:
                seconds = measurement.median_seconds
                speed = {
                    "tokens_per_second": seconds and length / seconds,
                    "model_flops_utilization": rate and seconds and flops / seconds / rate,
                }
                rows.append(measurement.row("step", length, **speed))
            problems += loss_problems(found, dtype)
            collect_garbage(device)
    return rows, problems


def memory_of(name: str, memory: MemoryConfig) -> MemoryConfig:
    """The settings of memory that a variant's name means."""
    return replace(
        memory,
        policy=name.partition("_")[0],
        keep=KeepConfig(attention=0 if name == "mst_without_keeping" else ALL),
        offload="host" if name == "mst_offload" else "none",
    )


def policy_of(name: str, config: BenchConfig) -> Policy:
    """What a variant's name means for the decoder."""
    return Policy.from_config(memory_of(name, config.memory))


def _variant(
    name: str, model: Transformer, batch: Batch, optimizer: Optimizer | None, config: BenchConfig
) -> Variant:
    offload = host_offload(config, batch.tokens.device) if name == "mst_offload" else None

    def prepare() -> None:
        model.policy = policy_of(name, config)
        model.offload = offload
        model.zero_grad(set_to_none=True)

    def forward() -> Tensor:
        return model(batch.tokens, batch.labels)[0] / batch.valid_tokens

    def run() -> Tensor:
        if optimizer is not None:
            optimizer.set_learning_rate(0.0)
        loss = forward()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        return loss.detach()

    def inspect(loss: Tensor) -> dict[str, Any]:
        return {"loss": loss.item(), "host_bytes": offload.host_bytes if offload else 0}

    # The host's buffers are made in the first forward: on a CPU they would count as the device's.
    warm_up: Callable[[], object] | None = forward if offload else None
    return Variant(name, run, prepare, inspect, warm_up)


def host_offload(config: BenchConfig, device: torch.device) -> Offload:
    """The host's memory, as much of it as the configuration allows, or leaves to this process."""
    budget = config.memory.host_budget_gib
    if budget is None:  # a machine that runs out of memory would end the process without a word
        return Offload(device, int(HOST_SHARE * this_device(torch.device("cpu")).memory_bytes))
    return Offload(device, int(budget * GIB))


def _optimizer(config: BenchConfig, model: Transformer) -> Optimizer | None:
    """The configured optimizer, with its states in place; None where it is not measured."""
    if not config.bench.optimizer:
        return None
    optimizer = build_optimizer(
        model, config.optimizer, master_weights=config.precision == "bf16_master"
    )
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.embedding.weight.device)
    optimizer.set_learning_rate(0.0)
    loss, _ = model(tokens, tokens)
    loss.backward()
    optimizer.step()
    return optimizer
