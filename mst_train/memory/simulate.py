"""A training step without its data: the code that trains, run on tensors that have only shapes.

``simulate`` builds the model, the optimizer and the batch under torch's fake tensors and runs
``train_step`` on them, while a tracker adds up the bytes that would be alive and the operations
that would be done. Nothing is allocated and nothing computed, so a model of any size takes seconds
on any machine.

What runs is the code of the run itself but for what needs a real device or other processes:
attention on a GPU is replaced by a kernel that takes the same memory (``SimulatedKernel``), AdamW
on the host by torch's, what carries tensors between processes and DeepSpeed's ZeRO by what takes
their memory (``SimulatedTransport``, ``SimulatedZero``), and numbers read off the device are 1.

What tensors do not show is added as constants, named below: the CUDA context, cuBLAS's workspace,
buffers of communication, and what the caching allocator cannot use, where that is not found by
giving it what the step asks for (reserved.py).
"""

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import record_function

from mst_train.attention import select_attention
from mst_train.attention.select import FOR_CUDA, HALF, Attention, KernelAttention, shared
from mst_train.config import AUTO, Config, ModelConfig
from mst_train.data import Batch
from mst_train.distributed.exchange import ALONE, Exchange, choose_exchange
from mst_train.engine import NativeEngine
from mst_train.engine.step import train_step
from mst_train.memory.counter import Numbers, StepCounter, TracingCounter, Work
from mst_train.memory.devices import Device
from mst_train.memory.fakes import (
    SimulatedHostOptimizer,
    SimulatedKernel,
    simulated_sharing,
    without_data,
)
from mst_train.memory.simulated_zero import Buckets, SimulatedZero
from mst_train.memory.trace import Request, Trace, requests
from mst_train.model import Policy, Transformer, build_model
from mst_train.mst import Offload
from mst_train.mst.accumulate import simulated_device
from mst_train.mst.attention import KEYS_AT_ONCE
from mst_train.mst.offload import AHEAD
from mst_train.mst.sharing import Places
from mst_train.optim import Optimizer, build_optimizer
from mst_train.precision import weight_type
from mst_train.ranges import OPTIMIZER_RANGE
from mst_train.units import MIB

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
"""Room for gradients on their way between GPUs without ZeRO. Assumed: the sums are in place."""

UNUSABLE_SHARE = 0.02
"""What the caching allocator holds beyond what is in use, as a share of that, where its rules are
not followed (reserved.py). They give less with expandable segments for what fills a GPU, and more
without."""


@dataclass(frozen=True)
class Simulation:
    """A step's memory and work on one device.

    policy: with the numbers that "auto" stood for. allocated_bytes: the most that tensors and
    workspaces take at once, what ``torch.cuda.max_memory_allocated`` reports. overhead_bytes: what
    the device holds beside them. breakdown: allocated_bytes by kind. host_bytes: for what is
    offloaded. reserved_bytes: what torch's allocator holds for tensors, as
    ``torch.cuda.max_memory_reserved`` reports; None where that was not asked for.
    """

    policy: Policy
    allocated_bytes: int
    overhead_bytes: int
    host_bytes: int
    breakdown: dict[str, int] = field(hash=False)
    work: Work
    reserved_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        """What the device has to have."""
        return self.allocated_bytes + self.overhead_bytes

    @property
    def passing_bytes(self) -> int:
        """Of allocated_bytes, what is gone when the step is over."""
        staying = ("parameters", "optimizer")
        return self.allocated_bytes - sum(self.breakdown.get(kind, 0) for kind in staying)


def simulate(
    config: Config,
    device: Device,
    *,
    gpus: int = 1,
    per_machine: int | None = None,
    build: "Build | None" = None,
    cu_seqlens: Tensor | None = None,
) -> Simulation:
    """One training step of ``config`` on one of ``gpus`` devices, once the states exist.

    per_machine: so many of them are in a machine; None: all. build: makes the model, where it is
    not the decoder of this project. cu_seqlens: where the documents of the batch begin and end, as
    ``Batch`` has them; None: one document in each row, the whole sequence, which takes the most
    time and memory. On a CPU the peak is that of the real step to the byte, as the tracker counts
    it, for the boundaries given; without them it is one that documents packed otherwise stay
    within.

    Micro-batches beyond the second change nothing but the work, which is counted for all. Deep
    models are run at two small depths, and sequences of many chunks at three shorter lengths, and
    extrapolated: blocks are alike and so are chunks. At each moment of a step (the forward of the
    first block, the head, the backward of the last block, ...) memory is a straight line over the
    number of blocks, and over the length; the work is one over the blocks, and with attention a
    parabola over the length.
    """
    dtype = weight_type(config.precision)
    exchange = choose_exchange(config, per_machine or gpus, device.kind)
    whole_blocks = _whole_blocks(config, dtype, device)
    policy = _policy(config, dtype, device, whole_blocks)
    shared_out = gpus > 1 and config.parallel.zero_stage > 0
    buckets = Buckets.of(config, device.kind) if shared_out else None
    build = build or partial(build_decoder, exchange=exchange)
    run = partial(_at_any_depth, policy, dtype, device, gpus, buckets, cu_seqlens, build)
    lengths = None
    if cu_seqlens is None:
        lengths = _shorter_lengths(config, policy, whole_blocks, exchange)
    if lengths is None:
        found = run(config)
    else:
        length = config.data.sequence_length
        found = _at_length(length, lengths, [run(with_length(config, n)) for n in lengths])
    peak = max(found.moments.values(), key=lambda kinds: sum(kinds.values()))
    breakdown = {kind: round(size) for kind, size in peak.items() if size}
    allocated = sum(breakdown.values())
    return Simulation(
        policy=policy,
        allocated_bytes=allocated,
        overhead_bytes=_overhead(allocated, config, device, gpus),
        host_bytes=round(found.host_bytes),
        breakdown=breakdown,
        work=Work(**found.work),
    )


def recorded(
    config: Config, device: Device, shallow: Config, gpus: int, per_machine: int | None = None
) -> tuple[list[Request], Trace]:
    """What ``config`` asks of the device's allocator before its steps, and what each step of
    ``shallow`` does: the same with fewer blocks, under the policy of ``config``.

    An optimizer's states are in the step, where its first update makes them.
    """
    dtype = weight_type(config.precision)
    policy = _policy(config, dtype, device, _whole_blocks(config, dtype, device))
    exchange = choose_exchange(config, per_machine or gpus, device.kind)
    build = partial(build_decoder, exchange=exchange)
    ready = partial(_ready, policy, dtype, device, gpus, None, build)
    with TracingCounter(*_units(device)) as counter, simulated_device(device.kind):
        whole = ready(config, counter)
        before = requests(counter.trace)
    del whole  # what is forgotten from here on is not of the trace
    batches = _batches(shallow, _boundaries(shallow))
    with TracingCounter(*_units(device)) as counter, simulated_device(device.kind):
        engine, model = ready(shallow, counter)
        with register_optimizer_step_pre_hook(_kept_states(engine, model, counter)):
            _step(engine, batches, shallow, counter)
        return before, counter.trace


_SHALLOW = 3
"""Blocks that differ by their place: the first, the last, and those between."""

_MANY_CHUNKS = 24
"""From here on chunks are extrapolated."""


def _at_any_depth(
    policy: Policy,
    dtype: torch.dtype,
    device: Device,
    gpus: int,
    buckets: Buckets | None,
    cu_seqlens: Tensor | None,
    build: "Build",
    config: Config,
) -> "_Found":
    period, ahead = layer_period(config.model), _ahead(config)
    shallow = max(_SHALLOW * period, _SHALLOW + ahead)
    deep = shallow + period
    layers = config.model.num_layers
    run = partial(_run, policy, dtype, device, gpus, buckets, cu_seqlens, build)
    if layers <= deep or layers % period:
        return run(config)

    def at(depth: int) -> _Found:
        found = run(with_layers(config, depth))
        return found._replace(moments=_keyed(found.moments, depth, 2 * period, ahead))

    return _combined([at(shallow), at(deep)], lambda values: _line(layers, (shallow, deep), values))


def _ahead(config: Config) -> int:
    """Blocks whose offloaded tensors come back while later ones are in their backward."""
    return AHEAD if config.memory.offload == "host" else 0


def _whole_blocks(config: Config, dtype: torch.dtype, device: Device) -> bool:
    """Whether attention is one that cannot attend chunk by chunk (``SdpaAttention``)."""
    name = config.kernel.attention
    if name == AUTO and device.kind == "cuda" and dtype not in HALF:
        name = "sdpa"
    return name == "sdpa" and config.parallel.sequence_parallel == 1


def _shorter_lengths(
    config: Config, policy: Policy, whole_blocks: bool, exchange: Exchange
) -> tuple[int, int, int] | None:
    """Lengths to run in the place of one with many chunks.

    All of them have the chunks before them that a backward may see at once, and the same last one.
    """
    chunk = policy.mlp_chunk_tokens if whole_blocks else policy.block_chunk_tokens
    length, batch = config.data.sequence_length, config.train.micro_batch_size
    assert isinstance(chunk, int) and isinstance(policy.head_chunk_tokens, int)
    places = Places(exchange.heads, exchange.keys)
    positions = math.lcm(-(-chunk // batch) * places.processes, places.multiple)
    at_once = max(KEYS_AT_ONCE, config.model.sliding_window or 0)
    if places.processes > 1:  # of the queries of one piece
        at_once *= 2 * places.keys
    at_once = max(at_once, 2 * policy.head_chunk_tokens // batch)
    first = max(8, -(-at_once // positions) + 1) * positions + length % positions
    lengths = (first, first + 4 * positions, first + 8 * positions)
    if not policy.mini_sequence or length <= lengths[-1] or length < _MANY_CHUNKS * positions:
        return None
    return lengths


def _at_length(length: int, lengths: tuple[int, int, int], found: list["_Found"]) -> "_Found":
    last = _combined(found[1:], lambda values: _line(length, lengths[1:], values))
    work = {
        name: _parabola(length, lengths, [one.work[name] for one in found])
        for name in found[0].work
    }
    return last._replace(work=work)


def _combined(found: list["_Found"], at: Callable[[list[float]], float]) -> "_Found":
    """What ``at`` makes of each number of several runs."""

    def numbers(several: list[Numbers]) -> Numbers:
        names = dict.fromkeys(name for one in several for name in one)
        return {name: at([one.get(name, 0.0) for one in several]) for name in names}

    moments = {m: numbers([one.moments[m] for one in found]) for m in found[-1].moments}
    work = numbers([one.work for one in found])
    return _Found(moments, at([one.host_bytes for one in found]), work)


def _line(x: float, places: Sequence[int], values: Sequence[float]) -> float:
    slope = (values[1] - values[0]) / (places[1] - places[0])
    return values[1] + slope * (x - places[1])


def _parabola(x: float, places: Sequence[int], values: Sequence[float]) -> float:
    """The parabola through three points (Lagrange)."""
    a, b, c = places
    return (
        values[0] * (x - b) * (x - c) / ((a - b) * (a - c))
        + values[1] * (x - a) * (x - c) / ((b - a) * (b - c))
        + values[2] * (x - a) * (x - b) / ((c - a) * (c - b))
    )


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

    moments: dict[Any, Numbers]
    host_bytes: float
    work: Numbers


def _run(
    policy: Policy,
    dtype: torch.dtype,
    device: Device,
    gpus: int,
    buckets: Buckets | None,
    cu_seqlens: Tensor | None,
    build: Build,
    config: Config,
) -> _Found:
    if cu_seqlens is None:
        cu_seqlens = _boundaries(config)
    shares = {}
    if buckets is not None and config.parallel.zero_stage == 3:
        shares["parameters"] = 1 / gpus
    batches = _batches(config, cu_seqlens)
    with StepCounter(*_units(device, shares)) as counter, simulated_device(device.kind):
        engine, _ = _ready(policy, dtype, device, gpus, buckets, build, config, counter)
        _step(engine, batches, config, counter)
    repeated = config.train.accumulation_steps / len(batches)
    return _Found(
        counter.moments,
        counter.peak_host_bytes,
        {name: repeated * number for name, number in counter.work.items()},
    )


def _units(
    device: Device, shares: Mapping[str, float] | None = None
) -> tuple[int, Mapping[str, float], int]:
    """A counter's arguments."""
    unit, host_unit = (ALLOCATION_BYTES, mmap.PAGESIZE) if device.kind == "cuda" else (1, 1)
    return unit, shares or {}, host_unit


def _ready(
    policy: Policy,
    dtype: torch.dtype,
    device: Device,
    gpus: int,
    buckets: Buckets | None,
    build: Build,
    config: Config,
    counter: StepCounter,
) -> tuple[NativeEngine, Any]:
    """An engine and its model, its optimizer's states there, as the counter sees them."""
    model = build(config, policy, dtype, device, counter)
    counter.watch_module(model)
    with record_function(OPTIMIZER_RANGE):
        engine: NativeEngine
        if buckets is None:
            engine = NativeEngine(model, _optimizer(model, config, counter))
        else:
            engine = SimulatedZero(model, config, gpus, buckets, counter)
    for block in model.blocks:
        next(block.parameters()).register_post_accumulate_grad_hook(counter.block_done)
    return engine, model


def _step(engine: NativeEngine, batches: list[Batch], config: Config, counter: StepCounter) -> None:
    """Run a step, counted from its start."""
    counter.reset()
    train_step(engine, batches, 0.0, config.optimizer.max_grad_norm)
    counter.end_moment()


def _kept_states(engine: NativeEngine, model: Any, counter: TracingCounter) -> Callable[..., None]:
    """A hook before each of torch's updates: the states that the first one makes, to the trace."""
    blocks = {id(w): index for index, block in enumerate(model.blocks) for w in block.parameters()}
    _, states = engine.state()
    owner = {
        id(states[name]["exp_avg"]): blocks.get(id(parameter))
        for name, parameter in model.named_parameters()
    }

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        counter.trace.keep(
            [
                (owner[id(state["exp_avg"])], tensor.untyped_storage().nbytes())
                for group in optimizer.param_groups
                for parameter in group["params"]
                if parameter.grad is not None
                for state in [optimizer.state[parameter]]
                for tensor in state.values()
                if counter.counts(tensor) and not counter.on_host(tensor)
            ]
        )

    return note


def _keyed(
    moments: Mapping[Any, Numbers], layers: int, near: int, ahead: int
) -> dict[Any, Numbers]:
    """Moments by names that mean the same at any depth: blocks counted from their nearer end.

    Of blocks between them, one of the two ends takes the most. near: blocks at either end that are
    counted from there, with ``ahead`` more at the backward's end.
    """
    last = {"forward": layers - 1, "backward": layers}
    keyed: dict[Any, Numbers] = {}
    for (micro_batch, phase, block), kinds in moments.items():
        from_end = last.get(phase, 0) - block
        if block < near:
            keyed[micro_batch, phase, "from the start", block] = kinds
        if from_end < near + ahead * (phase == "backward"):
            keyed[micro_batch, phase, "from the end", from_end] = kinds
    return keyed


def layer_period(model: ModelConfig) -> int:
    """After how many blocks they repeat."""
    return len(model.sliding_window_pattern) if model.sliding_window else 1


def with_length(config: Config, length: int) -> Config:
    """The same configuration at another sequence length."""
    return replace(config, data=replace(config.data, sequence_length=length))


def with_layers(config: Config, layers: int) -> Config:
    """The same configuration with another depth."""
    return replace(config, model=replace(config.model, num_layers=layers))


def _local_length(config: Config) -> int:
    """The positions of a sequence that one device has."""
    return config.data.sequence_length // config.parallel.sequence_parallel


def _policy(config: Config, dtype: torch.dtype, device: Device, whole_blocks: bool) -> Policy:
    """With its numbers."""
    return Policy.from_config(config.memory).resolved(
        config.model,
        (config.train.micro_batch_size, _local_length(config)),
        dtype,
        torch.device(device.kind),
        whole_blocks=whole_blocks,
    )


def fixed_bytes(config: Config, gpus: int) -> int:
    """What a GPU holds that torch's allocator does not give out."""
    communication = 0
    if gpus > 1:
        communication = NCCL_BYTES
        if config.parallel.zero_stage == 0:
            communication += COMMUNICATION_BUFFERS * BUCKET_BYTES
    return CUDA_CONTEXT_BYTES + CUBLAS_WORKSPACE_BYTES + communication


def _overhead(allocated_bytes: int, config: Config, device: Device, gpus: int) -> int:
    if device.kind != "cuda":
        return 0
    fixed = fixed_bytes(config, gpus)
    communication = fixed - CUDA_CONTEXT_BYTES - CUBLAS_WORKSPACE_BYTES
    return fixed + int((allocated_bytes + communication) * UNUSABLE_SHARE)


def _batches(config: Config, cu_seqlens: Tensor | None) -> list[Batch]:
    """A step's micro-batches: those beyond the second change nothing."""
    shape = (config.train.micro_batch_size, _local_length(config))

    def batch() -> Batch:
        tokens, labels, positions = (
            torch.empty(shape, dtype=torch.int64, device="meta") for _ in range(3)
        )
        return Batch(tokens, labels, positions, cu_seqlens)

    return [batch() for _ in range(min(config.train.accumulation_steps, 2))]


def _boundaries(config: Config) -> Tensor | None:
    """One document in each row, in the place of those that the data will have.

    Attention sees whole sequences, however many processes share them.
    """
    if config.data.attention != "documents":
        return None
    rows = torch.arange(config.train.micro_batch_size + 1, dtype=torch.int32)
    return rows * config.data.sequence_length


def build_decoder(
    config: Config,
    policy: Policy,
    dtype: torch.dtype,
    device: Device,
    counter: StepCounter,
    exchange: Exchange = ALONE,
) -> Transformer:
    """This project's decoder, with what stands in for a device's attention."""
    attention = _attention(config.kernel.attention, dtype, device, counter)
    if config.parallel.sequence_parallel > 1:
        sharing = simulated_sharing(config, exchange, counter)
        attention = shared(attention, sharing, torch.device(device.kind))
    model = build_model(
        config.model, policy=policy, attention=attention, dtype=dtype, device="meta"
    )
    if config.memory.offload == "host":
        model.offload = Offload(torch.device("meta"))
    return model


def _attention(name: str, dtype: torch.dtype, device: Device, counter: StepCounter) -> Attention:
    """The device's attention, without data: its own code's place is taken where it has some."""
    if device.kind == "cuda" and (name in FOR_CUDA or (name == AUTO and dtype in HALF)):
        kernel = SimulatedKernel(counter, name)
        return KernelAttention(kernel, lambda scores: KernelAttention(kernel.of(scores)))
    return without_data(select_attention(name, torch.device(device.kind), dtype), counter)


def _optimizer(model: Transformer, config: Config, counter: StepCounter) -> Optimizer:
    """The run's optimizer, its states as they are after the first step, which makes them."""
    build = SimulatedHostOptimizer if config.optimizer.offload == "host" else build_optimizer
    optimizer = build(model, config.optimizer, master_weights=config.precision == "bf16_master")
    state = optimizer.state_dict()
    for name, parameter in model.named_parameters():
        state[name] |= dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter.detach())
        state[name]["step"] = torch.ones(())
    with counter.untraced() if isinstance(counter, TracingCounter) else nullcontext():
        optimizer.load_state_dict(state)
    return optimizer
