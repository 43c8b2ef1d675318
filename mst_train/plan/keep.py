"""What blocks keep where memory is left: whatever saves the most time for its bytes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from mst_train.config import AUTO, Config, KeepConfig
from mst_train.memory.simulate import UNUSABLE_SHARE
from mst_train.model.flops import scores
from mst_train.mst import ATTENTION, KEYS, MLP, OUTPUT, QUERIES
from mst_train.plan.predict import Prediction
from mst_train.precision import weight_type

ATTEMPTS = 3
"""Predictions that are made at most: of everything kept, of what then has room, and of less."""


@dataclass(frozen=True)
class Piece:
    """What a block may keep.

    bytes: that it takes in one block. seconds: of a micro-batch that it saves there; as operations
    where the device's rates are not known.
    """

    name: str
    bytes: int
    seconds: float


def fill(
    lean: Prediction, asked: KeepConfig, predict: Callable[[Config], Prediction]
) -> Prediction | None:
    """``lean`` with more kept, as much as fits; None where there is nothing to be had.

    lean: fits, under mst, with nothing kept that is left to "auto". asked: what is. predict: what
    predicted ``lean``.
    """
    pieces = [piece for piece in _pieces(lean) if getattr(asked, piece.name) == AUTO]
    layers = lean.config.model.num_layers
    # Of the moment that holds all that is kept, as everything shows: it need not be the lean peak.
    counts = {piece.name: layers for piece in pieces}
    room = sum(layers * piece.bytes for piece in pieces)
    for _ in range(ATTEMPTS):
        if not any(counts.values()):
            return None
        keep = replace(asked, **counts)
        prediction = predict(replace(lean.config, memory=replace(lean.config.memory, keep=keep)))
        if prediction.fits:
            return prediction
        room -= _without_overhead(prediction.shortage_bytes, lean)
        counts = _greedy(pieces, layers, room)
    return None


def _without_overhead(size: int, prediction: Prediction) -> int:
    """The part of a device's bytes that tensors can have."""
    on_gpu = prediction.target.device.kind == "cuda"
    return math.ceil(size / (1 + UNUSABLE_SHARE)) if on_gpu else size


def _pieces(lean: Prediction) -> list[Piece]:
    """What a block of this process may keep, the most seconds for its bytes first."""
    config, rates = lean.config, lean.target.rates
    model, shared = config.model, config.parallel.sequence_parallel
    length, size = config.data.sequence_length, weight_type(config.precision).itemsize
    sequences = config.train.micro_batch_size
    tokens = sequences * length // shared
    queries, keys = (n * model.head_dim for n in (model.num_heads, 2 * model.num_kv_heads))
    chunk = lean.simulation.policy.block_chunk_tokens
    assert isinstance(chunk, int)
    # Keys come first, and once more with the rest; where processes share a sequence, queries too.
    keys_runs = 2 if chunk < tokens or shared > 1 else 1
    widths = {
        KEYS: (keys, model.hidden_size * keys_runs),
        QUERIES: (queries, model.hidden_size * (2 if shared > 1 else 1)),
        OUTPUT: (model.hidden_size, queries),
        MLP: (2 * model.intermediate_size, model.hidden_size),
    }
    if model.num_experts is not None:  # whose products no block keeps
        del widths[MLP]
    product_rate, attention_rate = (
        (1.0, 1.0) if rates is None else (rates.products, rates.attention_forward)
    )
    statistics = model.num_heads * max(size, 4)
    pairs = sequences * scores(model, length) / model.num_layers / shared
    attention = Piece(
        ATTENTION, tokens * (queries * size + statistics), 4 * pairs * queries / attention_rate
    )
    products = (
        Piece(name, tokens * features * size, 2 * tokens * features * inputs / product_rate)
        for name, (features, inputs) in widths.items()
    )
    return sorted([attention, *products], key=lambda piece: -piece.seconds / piece.bytes)


def _greedy(pieces: list[Piece], layers: int, room: int) -> dict[str, int]:
    """How many blocks keep each piece: as many as there is room for, the best ones first."""
    counts = {}
    for piece in pieces:
        counts[piece.name] = max(0, min(layers, room // piece.bytes))
        room -= counts[piece.name] * piece.bytes
    return counts
