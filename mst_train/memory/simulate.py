"""A training step without its data: the code that trains, run on tensors that have only shapes.

``simulate`` builds the model, the optimizer and the batch under torch's fake tensors and runs
``train_step`` on them, while a tracker adds up the bytes that would be alive and the operations
that would be done. Nothing is allocated and nothing computed, so a model of any size takes seconds
on any machine.

What runs is the code of the run itself but for three things that need a real device: attention on
a GPU is replaced by a kernel that takes the same memory (``SimulatedKernel``), AdamW on the host by
torch's, and numbers read off the device are 1.

What tensors do not show is added as constants, named below: the CUDA context, cuBLAS's workspace,
buffers of communication, and what the caching allocator cannot use.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from mst_train.config import Config, ModelConfig
from mst_train.data import Batch
from mst_train.memory.counter import Moment, Numbers, StepCounter, Work
from mst_train.memory.devices import Device
from mst_train.memory.stand_ins import SimulatedHostOptimizer, SimulatedKernel, SimulatedUlysses
from mst_train.memory.tracker import OPTIMIZER_RANGE
from mst_train.model import Transformer, build_model, select_attention
from mst_train.model.attention import Attention, KernelAttention
from mst_train.model.flops import parameter_count
from mst_train.mst import Offload, Policy
from mst_train.optim import Optimizer, build_optimizer
from mst_train.step import train_step

CPU = torch.device("cpu")
MIB, GIB = 2**20, 2**30

CUDA_CONTEXT_BYTES = 512 * MIB
"""What a process takes of a GPU before its first tensor: context and loaded kernels."""

CUBLAS_WORKSPACE_BYTES = 32 * MIB
"""torch's default for Hopper; 8 MiB before it."""

ALLOCATION_BYTES = 512
"""torch's caching allocator hands out multiples of this."""

NCCL_BYTES = 1024 * MIB
"""Buffers of NCCL's channels between several GPUs. Assumed; not yet measured."""

BUCKET_BYTES = 256 * MIB
COMMUNICATION_BUFFERS = 2
"""Gradients or weights on their way between GPUs: one bucket filled while one is sent."""

GATHERED = 2
"""ZeRO-3: blocks whose weights are there in full, the one that computes and the next."""

UNUSABLE_SHARE = 0.02
"""What the caching allocator holds beyond what is in use, as a share of that: gaps between blocks,
with expandable segments. Assumed; not yet measured."""


@dataclass(frozen=True)
class Simulation:
    """A step's memory and work on one device.

    policy: with the numbers that "auto" stood for. allocated_bytes: the most that tensors and
    workspaces take at once, what ``torch.cuda.max_memory_allocated`` reports. overhead_bytes: what
    the device holds beside them. breakdown: allocated_bytes by kind. host_bytes: for what is
    offloaded.
    """

    policy: Policy
    allocated_bytes: int
    overhead_bytes: int
    host_bytes: int
    breakdown: dict[str, int] = field(hash=False)
    work: Work

    @property
    def peak_bytes(self) -> int:
        """What the device has to have."""
        return self.allocated_bytes + self.overhead_bytes


def simulate(
    config: Config, device: Device, *, gpus: int = 1, build: "Build | None" = None
) -> Simulation:
    """One training step of ``config`` on one of ``gpus`` devices, once the states exist.

    build: makes the model, where it is not the decoder of this project.

    Micro-batches beyond the second change nothing but the work, which is counted for all. Deep
    models are run at two small depths and extrapolated: the blocks are alike, so at each moment of
    a step (the forward of the first block, the head, the backward of the last block, ...) every
    number is a straight line over the number of blocks.
    """
    period = layer_period(config.model)
    shallow, deep = (_SHALLOW * period, (_SHALLOW + 1) * period)
    layers = config.model.num_layers
    if layers <= deep or layers % period:
        found = _run(config, device, gpus, build)
    else:
        low, high = (
            _run(with_layers(config, depth), device, gpus, build) for depth in (shallow, deep)
        )
        found = _extrapolated(low, high, (layers - deep) // period)
    peak = max(found.moments.values(), key=lambda kinds: sum(kinds.values()))
    breakdown = {kind: round(size) for kind, size in peak.items() if size}
    allocated = sum(breakdown.values())
    return Simulation(
        policy=found.policy,
        allocated_bytes=allocated,
        overhead_bytes=_overhead(allocated, config, device, gpus),
        host_bytes=round(found.host_bytes),
        breakdown=breakdown,
        work=Work(**found.work),
    )


_SHALLOW = 3
"""Blocks that differ by their place: the first, the last, and those between."""


class Build(Protocol):
    """Makes a model on the meta device whose ``blocks`` mark the moments of its backward."""

    def __call__(
        self,
        config: Config,
        policy: Policy,
        dtype: torch.dtype,
        device: Device,
        counter: StepCounter,
    ) -> Any: ...


class _Found(NamedTuple):
    """What one run of a step gives: bytes by kind at each moment's peak, and sums over the step."""

    policy: Policy
    moments: dict[Any, Numbers]
    host_bytes: float
    work: Numbers


def _extrapolated(shallow: _Found, deep: _Found, steps: int) -> _Found:
    """What a run deeper than ``deep`` by ``steps`` times their difference gives."""

    def beyond(low: float, high: float) -> float:
        return high + steps * (high - low)

    def all_beyond(low: Numbers, high: Numbers) -> Numbers:
        return {name: beyond(low.get(name, 0), high.get(name, 0)) for name in {*low, *high}}

    return _Found(
        deep.policy,
        {
            moment: all_beyond(shallow.moments[moment], kinds)
            for moment, kinds in deep.moments.items()
        },
        beyond(shallow.host_bytes, deep.host_bytes),
        all_beyond(shallow.work, deep.work),
    )


def _run(config: Config, device: Device, gpus: int, build: "Build | None") -> _Found:
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    tokens = config.train.micro_batch_size * _local_length(config)
    policy = Policy.from_config(config.memory)
    policy = policy.resolved(config.model, tokens, dtype, torch.device(device.kind))
    boundaries = _boundaries(config)
    counter = StepCounter(
        ALLOCATION_BYTES if device.kind == "cuda" else 1, _shares(config.parallel.zero_stage, gpus)
    )
    micro_batches = min(config.train.accumulation_steps, 2)
    batches = [_batch(config, boundaries) for _ in range(micro_batches)]
    with counter:
        model = (build or build_decoder)(config, policy, dtype, device, counter)
        counter.watch_module(model)
        with record_function(OPTIMIZER_RANGE):
            optimizer = _optimizer(model, config)
        for block in model.blocks:
            next(block.parameters()).register_post_accumulate_grad_hook(counter.block_done)
        counter.reset()
        train_step(model, optimizer, batches, 0.0, config.optimizer.max_grad_norm)
        counter.end_moment()
    repeated = config.train.accumulation_steps / micro_batches
    return _Found(
        policy,
        _keyed(counter.moments, config),
        counter.peak_host_bytes,
        {name: repeated * number for name, number in counter.work.items()},
    )


def _keyed(moments: Mapping[Moment, Numbers], config: Config) -> dict[Any, Numbers]:
    """Moments by names that mean the same at any depth: blocks counted from their nearer end."""
    near = 2 * layer_period(config.model)
    last = {"forward": config.model.num_layers - 1, "backward": config.model.num_layers}
    keyed: dict[Any, Numbers] = {}
    for (micro_batch, phase, block), kinds in moments.items():
        from_end = last.get(phase, 0) - block
        if block < near:
            keyed[micro_batch, phase, "from the start", block] = kinds
        if from_end < near:
            keyed[micro_batch, phase, "from the end", from_end] = kinds
    return keyed


def layer_period(model: ModelConfig) -> int:
    """After how many blocks they repeat."""
    return len(model.sliding_window_pattern) if model.sliding_window else 1


def with_layers(config: Config, layers: int) -> Config:
    """The same configuration with another depth."""
    return replace(config, model=replace(config.model, num_layers=layers))


def _local_length(config: Config) -> int:
    """The rows of a sequence that one device has."""
    return config.data.sequence_length // config.parallel.sequence_parallel


def _shares(zero_stage: int, gpus: int) -> dict[str, float]:
    """What part of each kind a device holds under ZeRO (Rajbhandari et al. 2020)."""
    sharded = ("optimizer", "gradients", "parameters")[:zero_stage]
    return dict.fromkeys(sharded, 1 / gpus)


def _overhead(allocated_bytes: int, config: Config, device: Device, gpus: int) -> int:
    if device.kind != "cuda":
        return 0
    communication = 0
    if gpus > 1:
        communication = NCCL_BYTES + COMMUNICATION_BUFFERS * BUCKET_BYTES
    if config.parallel.zero_stage == 3:
        communication += GATHERED * largest_part_bytes(config)
    unusable = int((allocated_bytes + communication) * UNUSABLE_SHARE)
    return CUDA_CONTEXT_BYTES + CUBLAS_WORKSPACE_BYTES + communication + unusable


def largest_part_bytes(config: Config) -> int:
    """The weights of a block, or of the head where they are more."""
    layers = config.model.num_layers
    in_blocks = parameter_count(config.model) - parameter_count(replace(config.model, num_layers=0))
    head = config.model.vocab_size * config.model.hidden_size
    return max(in_blocks // layers, head) * (4 if config.precision == "fp32" else 2)


def _batch(config: Config, boundaries: Tensor | None) -> Batch:
    shape = (config.train.micro_batch_size, _local_length(config))
    tokens, labels, positions = (
        torch.empty(shape, dtype=torch.int64, device="meta") for _ in range(3)
    )
    return Batch(tokens, labels, positions, boundaries)


def _boundaries(config: Config) -> Tensor | None:
    """One document in each row: no other packing takes more memory or time."""
    if config.data.attention != "documents":
        return None
    rows = torch.arange(config.train.micro_batch_size + 1, dtype=torch.int32)
    return rows * _local_length(config)


def build_decoder(
    config: Config, policy: Policy, dtype: torch.dtype, device: Device, counter: StepCounter
) -> Transformer:
    """This project's decoder, with what stands in for a device's attention."""
    degree = config.parallel.sequence_parallel
    kernel = SimulatedKernel(counter, config.kernel.attention)
    attention: Attention
    if degree > 1:
        attention = SimulatedUlysses(kernel, degree)
    elif device.kind == "cuda":
        attention = KernelAttention(kernel, lambda scores: KernelAttention(kernel.of(scores)))
    else:
        attention = select_attention(config.kernel.attention, CPU, dtype)
    model = build_model(
        config.model, policy=policy, attention=attention, dtype=dtype, device="meta"
    )
    if config.memory.offload == "host":
        model.offload = Offload(torch.device("meta"))
    return model


def _optimizer(model: Transformer, config: Config) -> Optimizer:
    """The run's optimizer, its states as they are after the first step."""
    build = SimulatedHostOptimizer if config.optimizer.offload == "host" else build_optimizer
    optimizer = build(model, config.optimizer, master_weights=config.precision == "bf16_master")
    state = optimizer.state_dict()
    for name, parameter in model.named_parameters():
        state[name] |= dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter.detach())
        state[name]["step"] = torch.ones(())
    optimizer.load_state_dict(state)
    return optimizer
