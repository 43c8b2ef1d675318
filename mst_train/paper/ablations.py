"""The number of chunks that the LM head, the MLPs or whole blocks are cut into, predicted."""

from collections.abc import Callable, Sequence
from typing import Any

from mst_train.paper.reported import K
from mst_train.plan.config import configured_target, read
from mst_train.plan.predict import predict

LENGTHS = (16 * K, 64 * K)
"""The paper's; and one at which blocks, too, can set the peak."""

BASE = ("+experiment=llama3_8b_lengths_mst", "memory.keep_attention=true")

KINDS = {
    "head": ("memory.head_chunk_tokens",),
    "mlp": ("memory.mlp_chunk_tokens",),
    "block": ("memory.block_chunk_tokens", "memory.mlp_chunk_tokens"),
}
"""The settings that cut. mlp: in blocks of one piece, which is the paper's method."""

COUNTS = {"head": (1, 2, 4, 8, 16, 32), "mlp": (1, 2, 4, 8), "block": (1, 2, 4, 8)}


def number_of_chunks(
    advance: Callable[[str], None],
    lengths: Sequence[int] = LENGTHS,
    base: Sequence[str] = BASE,
) -> dict[str, Any]:
    """Predictions for each length, kind and number of chunks; the other sizes are "auto"'s."""
    rows = []
    for length in lengths:
        for kind in KINDS:
            for count in COUNTS[kind]:
                advance(f"{kind} in {count} chunks at {length // K}K")
                config = read([*base, *settings(kind, count, length)])
                report = predict(config, configured_target(config)).report()
                rows.append({"tokens": length, "kind": kind, "chunks": count} | report)
    return {"rows": rows}


def settings(kind: str, count: int, length: int) -> list[str]:
    """The arguments for ``count`` chunks of a kind."""
    in_one_piece = [f"memory.block_chunk_tokens={length}"] if kind == "mlp" else []
    sizes = [f"{key}={length // count}" for key in KINDS[kind]]
    return [f"data.sequence_length={length}", *in_one_piece, *sizes]
