"""A deep model's step, and that of a long sequence, from steps of a few blocks and chunks.

Blocks that keep the same are alike, and so are chunks. At each moment of a step (the forward of the
first block, the head, the backward of the last block, ...) memory is a straight line over the
number of blocks that keep the same, and over the length; the work is one over the blocks, and with
attention a parabola over the length.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate, groupby
from typing import Any

from mst_train.config import Config, KeepConfig, ModelConfig
from mst_train.memory.counter import Numbers
from mst_train.memory.simulated_step import Found, SimulatedStep
from mst_train.model import Policy
from mst_train.mst.attention import KEYS_AT_ONCE
from mst_train.mst.offload import AHEAD
from mst_train.mst.sharing import Places

_SHALLOW = 3
"""Blocks that differ by their place: the first, the last, and those between."""

_MANY_CHUNKS = 24
"""From here on chunks are extrapolated."""

_TRACED = 4
"""Blocks that differ by their place, and one that sees none but those between."""


def at_any_length(step: SimulatedStep, config: Config) -> Found:
    """What the step of ``config`` takes; its trace, where it was run at its length, is that of
    ``with_layers(config, traced_layers(config))``.
    """
    lengths = _shorter_lengths(step, config)
    if lengths is None:
        return _at_any_depth(step, config)
    found = [_at_any_depth(step, with_length(config, n)) for n in lengths]
    return _at_length(config.data.sequence_length, lengths, found)


def traced_layers(config: Config) -> int:
    """The depth at which a trace stands for those of deeper models: for that of ``config``."""
    layers, period = config.model.num_layers, layer_period(config.model)
    if layers % period or len(_runs(config)) > 1:
        return layers
    return min(layers, _TRACED * period)


def _at_any_depth(step: SimulatedStep, config: Config) -> Found:
    """From a model whose runs of blocks are short, and for each one with that run a bit longer."""
    period, ahead = layer_period(config.model), _ahead(config)
    least = max(_SHALLOW * period, _SHALLOW + ahead)
    runs = _runs(config)
    short = [min(n, least + (n - least) % period) for n in runs]
    short = [n if n <= m + period else m for n, m in zip(runs, short, strict=True)]
    long = [r for r, n in enumerate(runs) if n > short[r]]
    longer = [[m + period * (i == r) for i, m in enumerate(short)] for r in long]
    depths = [short, *longer]

    def at(depth: list[int]) -> Found:
        found = step.run(_with_runs(config, runs, depth))
        return found if sum(depth) == traced_layers(config) else found._replace(trace=None)

    def keyed(depth: list[int]) -> Found:
        found = at(depth)
        return found._replace(moments=_keyed(found.moments, depth, 2 * period + ahead))

    if not long or sum(map(sum, depths)) >= sum(runs):
        return at(runs)
    times = [(runs[r] - short[r]) // period for r in long]

    def line(values: list[float]) -> float:
        first, *others = values
        return first + sum(n * (other - first) for n, other in zip(times, others, strict=True))

    return _combined([keyed(depth) for depth in depths], line)


def _runs(config: Config) -> list[int]:
    """How many blocks, one after the other, keep the same, from the first of the model."""
    layers = config.model.num_layers
    kept = [Policy.from_config(config.memory).kept_in(n, layers) for n in range(layers)]
    return [len([*same]) for _, same in groupby(kept)]


def _with_runs(config: Config, runs: list[int], depths: list[int]) -> Config:
    """The same configuration with other lengths of these runs."""
    before, after = ([0, *accumulate(reversed(lengths))] for lengths in (runs, depths))
    number = dict(zip(before, after, strict=True))
    keep = {
        name: min(count, before[-1]) if isinstance(count, int) else count
        for name, count in asdict(config.memory.keep).items()
    }
    counts = {name: number.get(count, count) for name, count in keep.items()}
    memory = replace(config.memory, keep=KeepConfig(**counts))
    return replace(with_layers(config, after[-1]), memory=memory)


def _ahead(config: Config) -> int:
    """Blocks whose offloaded tensors come back while later ones are in their backward."""
    return AHEAD if config.memory.offload == "host" else 0


def _shorter_lengths(step: SimulatedStep, config: Config) -> tuple[int, int, int] | None:
    """Lengths to run in the place of one with many chunks.

    All of them have the chunks before them that a backward may see at once, and the same last one.
    """
    if step.cu_seqlens is not None:
        return None
    policy, exchange = step.policy, step.exchange
    chunk = policy.mlp_chunk_tokens if step.whole_blocks else policy.block_chunk_tokens
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


def _at_length(length: int, lengths: tuple[int, int, int], found: list[Found]) -> Found:
    last = _combined(found[1:], lambda values: _line(length, lengths[1:], values))
    work = {
        name: _parabola(length, lengths, [one.work[name] for one in found])
        for name in found[0].work
    }
    return last._replace(work=work, trace=None)


def _combined(found: list[Found], at: Callable[[list[float]], float]) -> Found:
    """What ``at`` makes of each number of several runs."""

    def numbers(several: list[Numbers]) -> Numbers:
        names = dict.fromkeys(name for one in several for name in one)
        return {name: at([one.get(name, 0.0) for one in several]) for name in names}

    moments = {m: numbers([one.moments[m] for one in found]) for m in found[-1].moments}
    work = numbers([one.work for one in found])
    trace = next((one.trace for one in found if one.trace is not None), None)
    return Found(moments, at([one.host_bytes for one in found]), work, trace)


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


def _keyed(moments: Mapping[Any, Numbers], runs: list[int], near: int) -> dict[Any, Numbers]:
    """Moments by names that mean the same at any depth: by a run of blocks, and in it by the
    distance from its nearer end.

    Of blocks between them, one of the two ends takes the most. near: blocks at either end that are
    told apart.
    """
    ends = [*accumulate(runs)]
    keyed: dict[Any, Numbers] = {}
    for (micro_batch, phase, number), kinds in moments.items():
        block = {"forward": number, "backward": ends[-1] - 1 - number}.get(phase, -1)
        if block < 0:
            keyed[micro_batch, phase] = kinds
            continue
        run = bisect_right(ends, block)
        from_end = ends[run] - 1 - block
        from_start = runs[run] - 1 - from_end
        if from_start < near:
            keyed[micro_batch, phase, run, "from the start", from_start] = kinds
        if from_end < near:
            keyed[micro_batch, phase, run, "from the end", from_end] = kinds
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
