"""What a process does in the tests of memory: its live bytes in a step."""

import gc
from dataclasses import replace

import torch

from mst_train.attention import select_attention
from mst_train.attention.select import shared
from mst_train.cli.compose import compose
from mst_train.config import Config, ModelConfig, ParallelConfig
from mst_train.data import Batch
from mst_train.distributed import grid, init_distributed
from mst_train.distributed.transport import GroupTransport
from mst_train.engine import build_engine, partition
from mst_train.engine.step import train_step
from mst_train.memory.tracker import MemoryTracker
from mst_train.model import Policy, build_model
from mst_train.mst.sharing import Places, SharedSequence

CPU = torch.device("cpu")
LENGTH = 2048
MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=160,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
)
POLICIES = {
    "vanilla": Policy(),
    "recompute": Policy(recompute=True),
    "mst": Policy(True, True, 8, 8),
}


def peak_bytes(degrees):
    """The peak of forward and backward beyond weights and gradients, by policy and degree."""
    with init_distributed(Config()) as everybody:
        return {
            name: [peak(policy, degree, "heads", everybody) for degree in degrees]
            for name, policy in POLICIES.items()
        }


WIDE_HEADS = replace(MODEL, num_layers=1, num_heads=4, head_size=64)
"""Attention has the peak."""


def bytes_per_token(degrees, lengths):
    """What a peak grows by with each token of the sequence, where keys are exchanged."""
    policy = replace(POLICIES["mst"], block_chunk_tokens=64)
    with init_distributed(Config()) as everybody:
        grown = []
        for degree in degrees:
            shorter, longer = (
                peak(policy, degree, "keys", everybody, WIDE_HEADS, length) for length in lengths
            )
            grown.append((longer - shorter) / (lengths[1] - lengths[0]))
        return grown


def peak(policy, degree, exchange, everybody, shape=MODEL, length=LENGTH):
    config = Config(
        model=shape,
        parallel=ParallelConfig(
            sequence_parallel=degree, sequence_exchange=exchange, exchange_heads=1
        ),
    )
    topology = grid(everybody, config)
    # Alone, too, a process goes the way of several.
    alone = SharedSequence(Places(), GroupTransport(None), GroupTransport(None))
    local = select_attention("cpu", CPU, torch.float32)
    attention = shared(local, topology.sharing or alone, CPU)
    model = build_model(shape, policy=policy, attention=attention)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.zeros(1, length, dtype=torch.int64)
    batch = topology.part_of(Batch(tokens, tokens, torch.arange(length)[None]))
    peaks = []
    for _ in range(3):  # gloo's threads may let go of a buffer late
        with MemoryTracker() as tracker:
            loss_sum, _ = model(batch.tokens, batch.labels, batch.positions)
            loss_sum.backward()
        peaks.append(tracker.peak_bytes)
    return min(peaks)


def step_peaks(settings):
    """For each of the settings the peak of a whole training step, once the states exist."""
    with init_distributed(Config()) as everybody:
        return {name: step_peak(compose(given), everybody) for name, given in settings.items()}


def step_peak(config, everybody):
    topology = grid(everybody, config)
    shape = config.train.micro_batch_size, config.data.sequence_length
    tokens = torch.zeros(shape, dtype=torch.int64)
    places = torch.arange(shape[1]).expand(shape)
    batch = topology.part_of(Batch(tokens, tokens.clone(), places.clone()))
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    attention = select_attention(config.kernel.attention, CPU, dtype)
    if topology.sharing is not None:
        attention = shared(attention, topology.sharing, CPU)
    peaks = []
    with MemoryTracker() as tracker:
        model = build_model(
            config.model,
            policy=Policy.from_config(config.memory),
            attention=attention,
            dtype=dtype,
            partition=partition(config, topology),
        )
        engine = build_engine(model, config, topology)
        batches = [batch] * config.train.accumulation_steps
        # An all-to-all's buffers may be let go of late, as above: until the least has come twice.
        while len(peaks) < 7 and not all(topology.gather(_came_twice(peaks[1:]))):
            gc.collect()  # what DeepSpeed leaves in circles is no part of a step
            tracker.reset_peak()
            train_step(engine, batches, 1e-3, config.optimizer.max_grad_norm)
            peaks.append(tracker.peak_bytes)
    return min(peaks[1:])


def _came_twice(peaks):
    return peaks.count(min(peaks, default=0)) > 1
