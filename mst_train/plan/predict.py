"""Memory and time of one training step, against what there is."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from mst_train.config import Config
from mst_train.errors import UserError
from mst_train.memory.devices import Device, device_bytes
from mst_train.memory.reserved import reserved_bytes
from mst_train.memory.simulate import Simulation, fixed_bytes, simulate
from mst_train.memory.simulated_step import Build
from mst_train.memory.tracker import KINDS
from mst_train.model.flops import parameter_count
from mst_train.plan.rates import rates
from mst_train.plan.speed import seconds
from mst_train.plan.trial import Rates
from mst_train.precision import weight_type
from mst_train.rendezvous.dist_env import local_world_size
from mst_train.units import GIB

LABELS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "checkpoints": "kept activations",
    "working_set": "one block's work",
    "head": "LM head and loss",
    "other": "other",
    "overhead": "context, workspace, allocator",
}
"""The parts of a peak, in words."""


@dataclass(frozen=True)
class Target:
    """What a run is planned for.

    budget_bytes: of each device. host_budget_bytes: of the host for each device; None: not known.
    per_machine: devices in each machine.
    """

    device: Device
    gpus: int
    budget_bytes: int
    host_budget_bytes: int | None
    dtype: torch.dtype
    per_machine: int = 1

    @property
    def rates(self) -> Rates | None:
        """How fast the device is with tensors of this type; None where it is not known."""
        return rates(self.device, self.dtype)


@dataclass(frozen=True)
class Prediction:
    """A step of ``config`` on one device of ``target``."""

    config: Config
    target: Target
    simulation: Simulation

    @property
    def fits(self) -> bool:
        return self.shortage_bytes <= 0

    @property
    def shortage_bytes(self) -> int:
        """Bytes beyond the budget that is exceeded more; negative where there is room in both."""
        found, host = self.simulation, self.target.host_budget_bytes
        on_device = found.peak_bytes - self.target.budget_bytes
        if self.target.device.kind == "cpu":  # one memory for both
            on_device += found.host_bytes
        if host is None or not found.host_bytes:
            return on_device
        return max(on_device, found.host_bytes - host)

    @property
    def seconds(self) -> float | None:
        """Of a step; None where the device's rates are not known."""
        rates = self.target.rates
        return None if rates is None else seconds(self.simulation, rates, self.target.device)

    @property
    def tokens_per_step(self) -> int:
        """Of all devices."""
        train, parallel = self.config.train, self.config.parallel
        sequences = self.target.gpus // parallel.sequence_parallel
        sequences *= train.micro_batch_size * train.accumulation_steps
        return sequences * self.config.data.sequence_length

    def report(self) -> dict[str, Any]:
        """For programs; sizes in bytes, each for one device."""
        found, memory = self.simulation, self.config.memory
        shared = self.config.parallel.sequence_parallel > 1
        return {
            "fits": self.fits,
            "peak_bytes": found.peak_bytes,
            "allocated_bytes": found.allocated_bytes,
            "reserved_bytes": found.reserved_bytes,
            "budget_bytes": self.target.budget_bytes,
            "host_bytes": found.host_bytes,
            "host_budget_bytes": self.target.host_budget_bytes,
            "breakdown": {kind: found.breakdown.get(kind, 0) for kind in KINDS}
            | {"overhead": found.overhead_bytes},
            "flops_per_step": found.work.flops,
            "predicted_step_seconds": self.seconds,
            "tokens_per_step": self.tokens_per_step,
            "sequence_exchange": found.exchange.name if shared else None,
            "peer_bytes_per_step": found.work.peer_bytes,
            "network_bytes_per_step": found.work.network_bytes,
            "device": self.target.device.name,
            "gpus": self.target.gpus,
            "sequence_length": self.config.data.sequence_length,
            "policy": memory.policy,
            "keep": dict(found.policy.keep) if memory.policy == "mst" else {},
            "offload": memory.offload,
            "in_backward": self.config.optimizer.in_backward,
            "optimizer_offload": self.config.optimizer.offload,
            "block_chunk_tokens": found.policy.block_chunk_tokens,
            "mlp_chunk_tokens": found.policy.mlp_chunk_tokens,
            "head_chunk_tokens": found.policy.head_chunk_tokens,
        }


def make_target(
    config: Config,
    device: Device,
    gpus: int | None = None,
    *,
    here: bool = True,
    per_machine: int | None = None,
) -> Target:
    """What ``config`` is to be planned for.

    Args:
        gpus: how many such devices share the run; None: ``parallel.sequence_parallel``.
        here: whether the device is this machine's, so that this machine's is the host's memory.
        per_machine: how many of them a machine has; None: all.

    Raises UserError where the device cannot hold the weights at all.
    """
    memory = config.memory
    budget = device.memory_bytes
    if memory.device_budget_gib is not None:
        budget = min(budget, int(memory.device_budget_gib * GIB))
    host = None if memory.host_budget_gib is None else int(memory.host_budget_gib * GIB)
    if host is None and here:
        host = device_bytes(torch.device("cpu")) // local_world_size()
    gpus = gpus or config.parallel.sequence_parallel
    target = Target(
        device, gpus, budget, host, weight_type(config.precision), min(per_machine or gpus, gpus)
    )
    _require_weights(config, target)
    return target


def predict(config: Config, target: Target, build: Build | None = None) -> Prediction:
    """Run the step of ``config`` without its data; memory.policy must not be auto."""
    assert config.memory.policy != "auto"
    simulation = simulate(
        config, target.device, gpus=target.gpus, per_machine=target.per_machine, build=build
    )
    return Prediction(config, target, simulation)


def with_reserved(prediction: Prediction, *, expandable: bool) -> Prediction:
    """The same with what torch's allocator reserves; as it is on a CPU and where ZeRO shares out.

    Takes longer than the prediction. What fits is then what the allocator does not run out of on a
    device with this budget: what is free has gone back to the device before that. expandable:
    whether its segments can grow.
    """
    config, target, found = prediction.config, prediction.target, prediction.simulation
    if target.device.kind != "cuda":
        return prediction
    fixed = fixed_bytes(config, target.gpus)
    reserved = reserved_bytes(
        config,
        target.device,
        target.budget_bytes - fixed,
        expandable=expandable,
        gpus=target.gpus,
        per_machine=target.per_machine,
        trace=found.trace,
    )
    if reserved is None:
        return prediction
    overhead = fixed + reserved - found.allocated_bytes
    return replace(
        prediction, simulation=replace(found, reserved_bytes=reserved, overhead_bytes=overhead)
    )


def _require_weights(config: Config, target: Target) -> None:
    shared = target.gpus if config.parallel.zero_stage == 3 else 1
    weights = parameter_count(config.model) * target.dtype.itemsize // shared
    if weights > target.budget_bytes:
        whose = f"{target.device.name} has"
        if target.budget_bytes < target.device.memory_bytes:
            whose = "memory.device_budget_gib allows"
        halved = "precision=bf16_master or bf16, " if config.precision == "fp32" else ""
        raise UserError(
            f"the weights alone take {weights / GIB:.2f} GiB, and {whose} "
            f"{target.budget_bytes / GIB:.2f} GiB: take {halved}a larger device or budget, a "
            f"smaller model, or parallel.zero_stage=3 on several devices"
        )
