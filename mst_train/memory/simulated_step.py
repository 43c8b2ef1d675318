"""One training step without its data, at the depth and the length that it has.

The model, the optimizer and the batch are built on torch's meta device, and ``train_step`` runs on
them under a counter (counter.py).
"""

import mmap
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import record_function

from mst_train.attention import select_attention
from mst_train.attention.select import FOR_CUDA, HALF, Attention, KernelAttention, shared
from mst_train.config import AUTO, Config
from mst_train.data import Batch
from mst_train.distributed.exchange import ALONE, Exchange, choose_exchange
from mst_train.engine import NativeEngine
from mst_train.engine.step import train_step
from mst_train.memory.counter import Numbers, StepCounter
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
from mst_train.optim import Optimizer, build_optimizer
from mst_train.precision import weight_type
from mst_train.ranges import OPTIMIZER_RANGE

ALLOCATION_BYTES = 512
"""torch's caching allocator hands out multiples of this."""


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


class Found(NamedTuple):
    """What a step takes: bytes by kind at each moment's peak, and sums over the step.

    trace: what it asks of the device's allocator; None where that was not kept.
    """

    moments: dict[Any, Numbers]
    host_bytes: float
    work: Numbers
    trace: Trace | None = None


@dataclass(frozen=True)
class SimulatedStep:
    """Runs the step of configurations that differ in their depth and length alone.

    policy: with its numbers. whole_blocks: whether attention is one that cannot attend chunk by
    chunk (``SdpaAttention``). buckets: ZeRO's; None without it. cu_seqlens: of the batches; None:
    one document in each row.
    """

    policy: Policy
    whole_blocks: bool
    dtype: torch.dtype
    device: Device
    gpus: int
    exchange: Exchange
    buckets: Buckets | None
    build: Build
    cu_seqlens: Tensor | None = None

    @classmethod
    def of(
        cls,
        config: Config,
        device: Device,
        *,
        gpus: int = 1,
        per_machine: int | None = None,
        build: Build | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> "SimulatedStep":
        """As ``simulate`` takes them."""
        dtype = weight_type(config.precision)
        exchange = choose_exchange(config, per_machine or gpus, device.kind)
        whole_blocks = _whole_blocks(config, dtype, device)
        policy = Policy.from_config(config.memory).resolved(
            config.model,
            (config.train.micro_batch_size, _local_length(config)),
            dtype,
            torch.device(device.kind),
            whole_blocks=whole_blocks,
        )
        shared_out = gpus > 1 and config.parallel.zero_stage > 0
        buckets = Buckets.of(config, device.kind) if shared_out else None
        build = build or partial(build_decoder, exchange=exchange)
        return cls(policy, whole_blocks, dtype, device, gpus, exchange, buckets, build, cu_seqlens)

    def run(self, config: Config) -> Found:
        """A step of ``config``, once its optimizer's states exist.

        In its trace they are made by the first update.
        """
        cu_seqlens = _boundaries(config) if self.cu_seqlens is None else self.cu_seqlens
        batches = _batches(config, cu_seqlens)
        with self._counter(config) as counter, simulated_device(self.device.kind):
            engine, model = self._ready(config, counter)
            with _states_noted(engine, model, counter):
                counter.reset()
                train_step(engine, batches, 0.0, config.optimizer.max_grad_norm)
            counter.end_moment()
        repeated = config.train.accumulation_steps / len(batches)
        return Found(
            counter.moments,
            counter.peak_host_bytes,
            {name: repeated * number for name, number in counter.work.items()},
            counter.trace,
        )

    def before(self, config: Config) -> list[Request]:
        """What is asked of the device's allocator before the first step."""
        with self._counter(config) as counter, simulated_device(self.device.kind):
            _ = self._ready(config, counter)  # what it forgets from here on is not of the trace
            return requests(counter.trace)

    def _counter(self, config: Config) -> StepCounter:
        shares = {}
        if self.buckets is not None and config.parallel.zero_stage == 3:
            shares["parameters"] = 1 / self.gpus
        if self.device.kind == "cuda":
            return StepCounter(ALLOCATION_BYTES, shares, mmap.PAGESIZE)
        return StepCounter(1, shares)

    def _ready(self, config: Config, counter: StepCounter) -> tuple[NativeEngine, Any]:
        """An engine and its model, its optimizer's states there, as the counter sees them."""
        keep = Policy.from_config(config.memory).keep  # which depends on the depth
        policy = replace(self.policy, keep=keep)
        model = self.build(config, policy, self.dtype, self.device, counter)
        counter.watch_module(model)
        with record_function(OPTIMIZER_RANGE):
            engine: NativeEngine
            if self.buckets is None:
                engine = NativeEngine(model, build_ready_optimizer(model, config, counter))
            else:
                engine = SimulatedZero(model, config, self.gpus, self.buckets, counter)
        for block in model.blocks:
            next(block.parameters()).register_post_accumulate_grad_hook(counter.block_done)
        return engine, model


def _states_noted(
    engine: NativeEngine, model: Any, counter: StepCounter
) -> AbstractContextManager[Any]:
    """In this context the states that torch's first updates make come into the trace."""
    if isinstance(engine, SimulatedZero):
        return nullcontext()
    blocks = {id(w): index for index, block in enumerate(model.blocks) for w in block.parameters()}
    _, states = engine.state()
    owner = {
        id(state): blocks.get(id(parameter))
        for name, parameter in model.named_parameters()
        for key, state in states[name].items()
        if key not in ("step", "master")  # which are made anew
    }

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        counter.trace.keep(
            [
                (block, tensor.untyped_storage().nbytes())
                for group in optimizer.param_groups
                for parameter in group["params"]
                if parameter.grad is not None
                for state in [optimizer.state[parameter].values()]
                for block in [next(owner[id(t)] for t in state if id(t) in owner)]
                for tensor in state
                if counter.counts(tensor) and not counter.on_host(tensor)
            ]
        )

    return register_optimizer_step_pre_hook(note)


def _whole_blocks(config: Config, dtype: torch.dtype, device: Device) -> bool:
    """Whether attention is one that cannot attend chunk by chunk (``SdpaAttention``)."""
    name = config.kernel.attention
    if name == AUTO and device.kind == "cuda" and dtype not in HALF:
        name = "sdpa"
    return name == "sdpa" and config.parallel.sequence_parallel == 1


def _local_length(config: Config) -> int:
    """The positions of a sequence that one device has."""
    return config.data.sequence_length // config.parallel.sequence_parallel


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


def build_ready_optimizer(model: Transformer, config: Config, counter: StepCounter) -> Optimizer:
    """The run's optimizer, its states as they are after the first step, which makes them."""
    build = SimulatedHostOptimizer if config.optimizer.offload == "host" else build_optimizer
    optimizer = build(model, config.optimizer, master_weights=config.precision == "bf16_master")
    state = optimizer.state_dict()
    for name, parameter in model.named_parameters():
        state[name] |= dict.fromkeys(optimizer.state_names(name), parameter.detach())
        if "step" in state[name]:
            state[name]["step"] = torch.ones(())
    with counter.untraced():
        optimizer.load_state_dict(state)
    return optimizer
