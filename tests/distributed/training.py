"""What a process does in the tests of the engines: twelve steps of a small model."""

import dataclasses
import functools

import numpy as np
import torch
import torch.distributed as dist

from mst_train.attention import select_attention
from mst_train.attention.select import shared
from mst_train.config import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from mst_train.data import IGNORED, Loader, Sequences
from mst_train.data.loader import collate
from mst_train.data.packing import Sequence
from mst_train.distributed import (
    SharedSequences,
    Topology,
    grid,
    init_distributed,
)
from mst_train.engine import build_engine, partition
from mst_train.engine.step import evaluate, train_step
from mst_train.model import Policy, build_model
from mst_train.mst import Documents
from mst_train.optim import learning_rate

CPU = torch.device("cpu")
LENGTH, STEP_SEQUENCES, ACCUMULATION, STEPS = 24, 8, 2, 12

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    qk_norm="head",
)


class Documented(Sequences):
    """Sequences of a few documents each; unevenly many of their tokens count."""

    sequence_length = LENGTH

    def __len__(self):
        return 50

    @functools.cache  # noqa: B019
    def __getitem__(self, index):
        generator = np.random.default_rng(index)
        tokens = generator.integers(0, 64, LENGTH + 1)
        ignored = generator.random(LENGTH) < generator.random()
        labels = np.where(ignored, IGNORED, tokens[1:])
        borders = generator.choice(np.arange(1, LENGTH), 3, replace=False)
        starts = np.concatenate([[0], np.sort(borders)])
        places = np.arange(LENGTH)
        positions = places - starts[np.searchsorted(starts, places, side="right") - 1]
        return Sequence(tokens[:-1], labels, positions, starts)


def make_config(
    world=1,
    degree=1,
    stage=0,
    precision="fp32",
    steps=STEPS,
    policy="mst",
    tied=False,
    in_backward=False,
    offload="none",
    max_grad_norm=0.3,
    exchange="auto",
    optimizer="adamw",
    experts=None,
    sinks=False,
):
    """Whatever the processes, a step has the same sequences, in two micro-batches.

    With the optimizer in the backward in one, without clipping.
    """
    groups = world // degree
    accumulation = 1 if in_backward else ACCUMULATION
    return Config(
        precision=precision,
        train=TrainConfig(
            steps=steps,
            micro_batch_size=STEP_SEQUENCES // (accumulation * groups),
            accumulation_steps=accumulation,
        ),
        model=dataclasses.replace(
            MODEL, tie_embeddings=tied, num_experts=experts, attention_sinks=sinks
        ),
        data=DataConfig(sequence_length=LENGTH),
        memory=MemoryConfig(
            policy=policy, mlp_chunk_tokens=13, head_chunk_tokens=19, block_chunk_tokens=23
        ),
        parallel=ParallelConfig(
            sequence_parallel=degree, zero_stage=stage, sequence_exchange=exchange
        ),
        optimizer=OptimizerConfig(
            name=optimizer,
            learning_rate=3e-3,
            warmup_steps=4,
            max_grad_norm=None if in_backward else max_grad_norm,
            weight_decay=0.1,
            epsilon=1e-4,  # a gradient that is nearly zero is no place to see rounding
            in_backward=in_backward,
            offload=offload,
        ),
    )


def train(config, topology, saved=None, rounded=False):
    """Losses, gradient norms, what ``engine.state`` gives in the end, and the place reached."""
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    attention = select_attention("cpu", CPU, dtype)
    if topology.sharing is not None:
        attention = shared(attention, topology.sharing, CPU)
    policy = Policy.from_config(config.memory)
    model = build_model(
        config.model,
        policy=policy,
        attention=attention,
        dtype=dtype,
        seed=7,
        partition=partition(config, topology),
    )
    if rounded:  # start where a model in bf16 starts
        start = build_model(config.model, dtype=torch.bfloat16, seed=7)
        model.load_state_dict(start.state_dict())
    engine = build_engine(model, config, topology)
    done, position = 0, 0
    if saved is not None:
        done, position = saved["step"], saved["position"]
        engine.load(saved["weights"], saved["state"])
    size = config.train.micro_batch_size
    sequences = SharedSequences(Documented(), topology, size, position)
    loader = Loader(sequences, size, seed=11)
    losses, norms = [], []
    validation = None
    for step in range(done + 1, config.train.steps + 1):
        batches = [topology.part_of(next(loader)) for _ in range(config.train.accumulation_steps)]
        rate = learning_rate(step, STEPS, config.optimizer)
        loss, norm, _ = train_step(engine, batches, rate, config.optimizer.max_grad_norm)
        losses.append(loss)
        norms.append(norm)
        if step == STEPS // 2:
            validation = evaluate(model, validation_batches(), topology).mean
    weights, state = whole(engine.state(), topology)
    return {
        "losses": torch.tensor(losses),
        "norms": torch.tensor(norms),
        "validation": validation,
        "weights": {name: weight.detach() for name, weight in weights.items()},
        "state": state,
        "step": config.train.steps,
        "position": sequences.position(loader.state()),
    }


def whole(state, topology):
    """Weights and states of all processes, each of which has some of them."""
    weights, states = {}, {}
    shares = [None] * topology.world
    if topology.world == 1:
        shares = [state]
    else:
        dist.all_gather_object(shares, state, group=topology.object_group)
    for some_weights, some_states in shares:
        assert some_weights
        assert not weights.keys() & some_weights.keys()
        assert some_states.keys() <= some_weights.keys()
        weights |= some_weights
        states |= some_states
    return weights, states


def validation_batches():
    """Three, so that two data groups do not have equally many."""
    return [collate(Documented(), indices) for indices in ([3, 4], [5, 6], [7])]


def train_alone(saved=None, rounded=False, **settings):
    return train(make_config(**settings), Topology(), saved, rounded)


def train_together(world, runs):
    """Several runs one after the other in the same processes."""
    with init_distributed(make_config(world)) as topology:
        return [one_of(topology, **settings) for settings in runs]


def one_of(processes, **settings):
    config = make_config(processes.world, **settings)
    return train(config, grid(processes, config))


def forget_and_refuse(world, runs):
    """For each run, norms of gradients with a NaN and forgotten steps between them, and how many
    of the weights are whole on this process in the end.
    """
    with init_distributed(make_config(world)) as topology:
        return [forgets(make_config(world, **settings), topology) for settings in runs]


def forgets(config, topology):
    model = build_model(config.model, seed=7, partition=partition(config, topology))
    engine = build_engine(model, config, topology)
    sequences = SharedSequences(Documented(), topology, config.train.micro_batch_size, 0)
    batches = [collate(sequences, [i, i + 1]) for i in (0, 2)]

    def gradient_norm(scale):
        engine.set_learning_rate(1e-3)
        for index, batch in enumerate(batches):
            documents = Documents(batch.cu_seqlens)
            loss_sum, _ = engine(batch.tokens, batch.labels, batch.positions, documents)
            engine.backward(scale * loss_sum, last=index == 1)
        return engine.gradient_norm().item()

    norms = []
    for scale in (1.0, float("nan"), 1.0):
        norms.append(gradient_norm(scale))
        engine.zero_grad()
    # One that ends between its micro-batches.
    loss_sum, _ = engine(batches[0].tokens, batches[0].labels, batches[0].positions, None)
    engine.backward(loss_sum, last=False)
    engine.zero_grad()
    norms.append(gradient_norm(1.0))
    held = sum(parameter.numel() for parameter in model.parameters())
    return {"norms": norms, "held": held}


def save_and_continue(world, legs, states):
    """Go on from a state on disk (from none where first is 0), and leave one there."""
    with init_distributed(make_config(world)) as everybody:
        for leg in legs:
            first, last = leg["first"], leg["last"]
            config = make_config(world, leg["degree"], leg["stage"], steps=last)
            topology = grid(everybody, config)
            saved = torch.load(f"{states}/{first}.pt", mmap=True) if first else None
            result = train(config, topology, saved)
            if topology.is_rank_zero:
                torch.save(result, f"{states}/{last}.pt")
            dist.barrier()
