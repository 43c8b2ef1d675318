"""Random training steps, small enough to run: what one really holds, and what is predicted.

``python tests/memory/steps.py 0 500`` compares those of the seeds 0 to 499.
"""

import random
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch

import mst_kernels.row_blocks as row_blocks
import mst_train.attention.cpu as kernels_cpu
import mst_train.attention.tiled as kernels_tiled
import mst_train.memory.extrapolate as extrapolate
from mst_train.attention import select_attention
from mst_train.config import (
    ACTIVATIONS,
    ALL,
    NORM_PLACEMENTS,
    PRECISIONS,
    QK_NORMS,
    Config,
    DataConfig,
    KeepConfig,
    KernelConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    validate,
)
from mst_train.data import Batch
from mst_train.engine import NativeEngine
from mst_train.engine.step import train_step
from mst_train.memory.devices import find_device
from mst_train.memory.simulate import simulate
from mst_train.memory.tracker import MemoryTracker
from mst_train.model import Policy, build_model
from mst_train.mst import PIECES, Offload
from mst_train.optim import build_optimizer

CPU = torch.device("cpu")
KERNELS = ("auto", "cpu", "tiled", "reference", "sdpa")


@dataclass(frozen=True)
class Portions:
    """In what portions the code works, by itself in such large ones that small steps have one."""

    query_tile: int = kernels_tiled.TILES["cpu"][0]
    key_tile: int = kernels_tiled.TILES["cpu"][1]
    window_tile: int = kernels_cpu.WINDOW_TILE
    block_elements: int = row_blocks._CPU_BLOCK_ELEMENTS
    keys_at_once: int = extrapolate.KEYS_AT_ONCE

    @contextmanager
    def used(self):
        tiles = {"cpu": (self.query_tile, self.key_tile), "cuda": (3, 5)}
        with (
            patch.object(kernels_tiled, "TILES", tiles),
            patch.object(kernels_cpu, "WINDOW_TILE", self.window_tile),
            patch.object(row_blocks, "_CPU_BLOCK_ELEMENTS", self.block_elements),
            patch.object(extrapolate, "KEYS_AT_ONCE", self.keys_at_once),
            patch.object(kernels_tiled.TiledKernel, "keys_at_once", self.keys_at_once),
            patch.object(kernels_cpu.CpuKernel, "keys_at_once", self.keys_at_once),
        ):
            yield


@dataclass(frozen=True)
class Step:
    config: Config
    cu_seqlens: torch.Tensor | None = None
    portions: Portions = Portions()


def random_step(seed):
    """The step of a seed: the same everywhere and always."""
    draw = random.Random(seed)
    while validate(config := _random_config(draw)):
        pass
    config = with_random_sinks(seed, with_random_pieces(seed, config))
    portions = Portions()
    if draw.random() < 0.6:
        length, model = config.data.sequence_length, config.model
        widest = max(model.hidden_size, model.intermediate_size, model.vocab_size)
        portions = Portions(
            query_tile=_part(draw, length),
            key_tile=_part(draw, length),
            window_tile=_part(draw, length),
            block_elements=_part(draw, config.train.micro_batch_size * length * widest),
            keys_at_once=_part(draw, length),
        )
    cu_seqlens = _random_boundaries(draw, config) if config.data.attention == "documents" else None
    if config.optimizer.offload == "none" and draw.random() < 0.5:
        config = replace(config, optimizer=replace(config.optimizer, name="muon"))
    return Step(config, cu_seqlens, portions)


def marked(seeds, quick, slow):
    """So many of them for every run of the tests, so many marked slow, and the rest exhaustive."""
    return [
        *seeds[:quick],
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in seeds[quick : quick + slow]),
        *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in seeds[quick + slow :]),
    ]


def with_experts(seed, step):
    """The same in mini-sequences, with experts in the place of MLPs."""
    draw = random.Random(seed)
    experts = draw.choice([1, 4, 7])
    model = replace(
        step.config.model,
        num_experts=experts,
        experts_per_token=draw.randint(1, min(experts, 3)),
        normalize_experts=draw.random() < 0.5,
        expert_bias=draw.random() < 0.4,
        balance_loss=draw.choice([0.0, 0.1]),
        router_z_loss=draw.choice([0.0, 0.1]),
    )
    keep = replace(step.config.memory.keep, mlp=0)
    memory = replace(step.config.memory, policy="mst", keep=keep)
    return replace(step, config=replace(step.config, model=model, memory=memory))


def _part(draw, whole):
    """So much that there are a few parts of it, the last one odd or not."""
    return -(-whole // draw.choice([1, 2, 2, 3, 4])) + draw.randint(0, 2)


def _random_config(draw):
    kernel = draw.choice(KERNELS)
    heads, keys = draw.choice([(1, 1), (2, 1), (2, 2), (4, 2), (6, 2)])
    head_size = draw.choice([2, 8, 16])
    window = softcap = None
    if kernel != "sdpa":
        window = draw.choice([None, draw.randint(1, 20), draw.randint(20, 120)])
        softcap = draw.choice([None, None, 20.0])
    model = ModelConfig(
        vocab_size=draw.choice([17, 64, 301]),
        hidden_size=draw.choice([6, 16, 40]),
        intermediate_size=draw.choice([5, 32, 111]),
        num_layers=draw.choice([1, 1, 1, 1, 2, 2, 3, 5]),
        num_heads=heads,
        num_kv_heads=keys,
        head_size=head_size,
        tie_embeddings=draw.random() < 0.3,
        qkv_bias=draw.random() < 0.3,
        qk_norm=draw.choice(QK_NORMS),
        sliding_window=window,
        sliding_window_pattern=draw.choice(
            [["sliding"], ["sliding", "full"], ["sliding", "sliding", "full"]]
        ),
        attention_scale=draw.choice([None, 0.3]),
        attention_softcap=softcap,
        logit_softcap=draw.choice([None, 30.0]),
        activation=draw.choice(ACTIVATIONS),
        norm_placement=draw.choice(NORM_PLACEMENTS),
        norm_offset=draw.random() < 0.3,
        scale_embeddings=draw.random() < 0.3,
    )
    length = draw.choice([draw.randint(1, 20), draw.randint(20, 60), draw.randint(40, 150)])
    batch = draw.randint(1, 3)
    policy = draw.choice(["vanilla", "recompute", "mst", "mst", "mst"])
    update = draw.choice(["after", "after", "in_backward", "host"])
    return Config(
        precision=draw.choice(PRECISIONS),
        train=TrainConfig(micro_batch_size=batch, accumulation_steps=draw.choice([1] * 8 + [2, 3])),
        data=DataConfig(
            sequence_length=length, attention=draw.choice(["stream", "stream", "documents"])
        ),
        model=model,
        memory=MemoryConfig(
            policy=policy,
            mlp_chunk_tokens=draw.choice(["auto", _part(draw, batch * length)]),
            head_chunk_tokens=draw.choice(["auto", _part(draw, batch * length)]),
            block_chunk_tokens=draw.choice(["auto", _part(draw, batch * length)]),
            keep=KeepConfig(attention=ALL if draw.random() < 0.6 else 0),
            offload="host" if policy == "mst" and draw.random() < 0.4 else "none",
        ),
        optimizer=OptimizerConfig(
            max_grad_norm=None if update == "in_backward" else draw.choice([None, 1.0]),
            in_backward=update == "in_backward",
            offload="host" if update == "host" else "none",
        ),
        kernel=KernelConfig(attention=kernel),
    )


def with_random_pieces(seed, config):
    """In six of ten steps, some of them kept in some of the blocks."""
    draw = random.Random(-1 - seed)
    if draw.random() < 0.4:
        return config
    counts = [0, ALL, *(draw.randint(0, config.model.num_layers + 1) for _ in range(2))]
    attention = config.memory.keep.attention
    keep = KeepConfig(
        draw.choice([attention, draw.choice(counts)]), *(draw.choice(counts) for _ in PIECES[1:])
    )
    return replace(config, memory=replace(config.memory, keep=keep))


def with_random_sinks(seed, config):
    """In some steps sinks, and a bias beside the output projection."""
    draw = random.Random(f"sinks {seed}")
    sinks = config.kernel.attention != "sdpa" and draw.random() < 0.4
    model = replace(config.model, attention_sinks=sinks, output_bias=draw.random() < 0.3)
    return replace(config, model=model)


def _random_boundaries(draw, config):
    """Several documents in each row: many short ones, a few, or one."""
    length = config.data.sequence_length
    starts = []
    for row in range(config.train.micro_batch_size):
        count = min(draw.choice([0, 1, 3, 20]), length - 1)
        within = sorted(draw.sample(range(1, length), count)) if count else []
        starts += [row * length + place for place in (0, *within)]
    starts.append(config.train.micro_batch_size * length)
    assert all(start < end for start, end in pairwise(starts))
    return torch.tensor(starts, dtype=torch.int32)


def predicted(step):
    """Device and host peaks of the simulated step."""
    with step.portions.used():
        found = simulate(step.config, find_device("cpu"), cu_seqlens=step.cu_seqlens)
    assert sum(found.breakdown.values()) == found.allocated_bytes
    return found.allocated_bytes, found.host_bytes


def measured(step):
    """Device and host peaks of the real step, its second: the states exist."""
    config = step.config
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    batches = [
        Batch(
            torch.randint(config.model.vocab_size, (rows, length)),
            torch.randint(config.model.vocab_size, (rows, length)),
            torch.arange(length).expand(rows, -1).clone(),
            step.cu_seqlens,
        )
        for _ in range(config.train.accumulation_steps)
    ]
    with step.portions.used(), MemoryTracker() as tracker:
        model = build_model(
            config.model,
            policy=Policy.from_config(config.memory),
            attention=select_attention(config.kernel.attention, CPU, dtype),
            dtype=dtype,
        )
        if config.memory.offload == "host":
            model.offload = Offload(CPU)
        optimizer = build_optimizer(
            model, config.optimizer, master_weights=config.precision == "bf16_master"
        )
        engine = NativeEngine(model, optimizer)
        for _ in range(2):
            tracker.reset_peak()
            train_step(engine, batches, 1e-3, config.optimizer.max_grad_norm)
    return tracker.peak_bytes, tracker.peak_host_bytes


def describe(step):
    """What a step has that the plainest has not."""
    plain, words = Config(), []
    for group in ("model", "data", "memory", "train", "optimizer", "kernel"):
        mine, other = getattr(step.config, group), getattr(plain, group)
        words += [
            f"{group}.{name}={value}"
            for name, value in vars(mine).items()
            if value != getattr(other, name)
        ]
    documents = "" if step.cu_seqlens is None else f" documents={step.cu_seqlens.tolist()}"
    return f"{step.config.precision} {' '.join(words)}{documents} {step.portions}"


def main(first, last):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    differ = 0
    for seed in range(first, last):
        step = random_step(seed)
        try:
            real, found = measured(step), predicted(step)
        except Exception as error:
            real, found = "error", f"{type(error).__name__}: {error}"
        if (seed - first) % 20 == 19:
            print(f"... {seed + 1}", flush=True)
        if real != found:
            differ += 1
            print(f"seed {seed}: measured {real}, predicted {found}: {describe(step)}", flush=True)
    print(f"{last - first} steps, {differ} differ")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
