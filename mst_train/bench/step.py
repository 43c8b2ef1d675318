"""Whole training steps of one model under each memory policy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mst_train.bench.config import BenchConfig
from mst_train.bench.measure import Measurement, Variant, collect_garbage, measure
from mst_train.bench.progress import Progress
from mst_train.bench.workload import Batch, build, chosen, lengths, loss_problems, random_batch
from mst_train.config import MemoryConfig
from mst_train.memory.devices import this_device
from mst_train.model import Policy, Transformer
from mst_train.model.flops import training_flops
from mst_train.mst import Offload
from mst_train.optim import Optimizer, build_optimizer
from mst_train.precision import weight_type
from mst_train.units import GIB

VARIANTS = ("vanilla", "recompute", "mst", "mst_without_keeping", "mst_offload")


def run(
    config: BenchConfig,
    device: torch.device,
    names: tuple[str, ...] = VARIANTS,
    more_often: Callable[[int], int] = lambda length: 1,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of measurements, and what is wrong with them.

    A sequence of a length is measured ``more_often(length)`` times the configured repetitions.
    """
    wanted = chosen(config, names)
    model = build(config, device)
    optimizer = _optimizer(config, model)
    rows, problems = [], []
    repetitions = {n: config.bench.repetitions * more_often(n) for n in lengths(config)}
    with Progress(len(wanted) * sum(1 + r for r in repetitions.values())) as progress:
        for length in lengths(config):
            batch = random_batch(config, length, device)
            variants = [_variant(name, model, batch, optimizer, config) for name in wanted]
            measurements = measure(variants, repetitions[length], device, advance=progress.advance)
            rows += step_rows(config, length, measurements, device)
            problems += loss_problems(measurements, weight_type(config.precision))
            del variants
            collect_garbage(device)
    return rows, problems


def memory_of(name: str, memory: MemoryConfig) -> MemoryConfig:
    """The settings of memory that a variant's name means."""
    return replace(
        memory,
        policy=name.partition("_")[0],
        keep_attention=name != "mst_without_keeping",
        offload="host" if name == "mst_offload" else "none",
    )


def policy_of(name: str, config: BenchConfig) -> Policy:
    """What a variant's name means for the decoder."""
    return Policy.from_config(memory_of(name, config.memory))


def step_rows(
    config: BenchConfig, length: int, measurements: list[Measurement], device: torch.device
) -> list[dict[str, Any]]:
    """One row for each variant, with speed and utilisation."""
    rate = this_device(device).bf16_flops
    flops = training_flops(config.model, length)
    rows = []
    for measurement in measurements:
        seconds = measurement.median_seconds
        rows.append(
            {
                "work": "step",
                "tokens": length,
                "variant": measurement.variant,
                "seconds": measurement.seconds,
                "median_seconds": seconds,
                "min_seconds": measurement.min_seconds,
                "cpu_seconds": measurement.cpu_seconds,
                "tokens_per_second": seconds and length / seconds,
                "model_flops_utilization": rate and seconds and flops / seconds / rate,
                "peak_bytes": measurement.peak_bytes,
                **measurement.found,
                "problem": measurement.problem,
                "failed": measurement.failed,
            }
        )
    return rows


def _variant(
    name: str, model: Transformer, batch: Batch, optimizer: Optimizer | None, config: BenchConfig
) -> Variant:
    offload = _offload(config, batch.tokens.device) if name == "mst_offload" else None

    def prepare() -> None:
        model.policy = policy_of(name, config)
        model.offload = offload
        model.zero_grad(set_to_none=True)

    def forward() -> Tensor:
        loss_sum: Tensor = model(batch.tokens, batch.labels)[0]
        return loss_sum / batch.valid_tokens

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


def _offload(config: BenchConfig, device: torch.device) -> Offload:
    budget = config.memory.host_budget_gib
    return Offload(device, None if budget is None else int(budget * GIB))


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
