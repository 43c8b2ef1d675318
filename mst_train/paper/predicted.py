"""What is predicted: the longest sequences, on one GPU and on several, and what fills the memory.

Each piece tells ``advance`` what it computes now.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mst_train.memory.simulated_step import Build
from mst_train.paper.reported import MODELS, SEVERAL_GPUS, K, Reported
from mst_train.plan.baseline import transformers_baseline
from mst_train.plan.choose import longest, over_lengths
from mst_train.plan.config import configured_target, read
from mst_train.plan.predict import predict
from mst_train.plan.search import STEP

Advance = Callable[[str], None]

BASELINE_STEP = 256
"""What exists today reaches short sequences: its limits are found to 256 tokens."""

OFFLOADED = "Llama3-8B"
OFFLOAD = ("memory.offload=host", "memory.host_budget_gib=512")

_MST = "+experiment=llama3_8b_lengths_mst"
WAYS = {
    "vanilla": ("+experiment=llama3_8b_lengths_vanilla",),
    "recompute": ("+experiment=llama3_8b_lengths_recompute",),
    "mst, keeping attention's result": (_MST, "memory.keep.attention=all"),
    "mst, computing attention again": (_MST, "memory.keep.attention=0"),
}
"""The settings whose memory is shown over lengths from 1K to 80K."""

CUT_LENGTHS = (16 * K, 64 * K)
"""The paper's; and one at which blocks, too, can set the peak."""

CUT = (_MST, "memory.keep.attention=auto")

KINDS = {
    "head": ("memory.head_chunk_tokens",),
    "mlp": ("memory.mlp_chunk_tokens",),
    "block": ("memory.block_chunk_tokens", "memory.mlp_chunk_tokens"),
}
"""The settings that cut. mlp: in blocks of one piece, which is the paper's method."""

COUNTS = {"head": (1, 2, 4, 8, 16, 32), "mlp": (1, 2, 4, 8), "block": (1, 2, 4, 8)}


def longest_sequences(advance: Advance, models: Sequence[Reported] = MODELS) -> dict[str, Any]:
    """For each model what the paper reports and what is predicted for one GPU."""
    return {
        "rows": [
            {"reported": model._asdict(), "predicted": _limits(model, advance)} for model in models
        ]
    }


def _limits(model: Reported, advance: Advance) -> dict[str, Any]:
    """The prediction at the longest sequence of each way; None where no length fits."""

    def limit(name: str, step: int, build: Build | None, *settings: str) -> dict[str, Any] | None:
        config = read([f"+experiment={model.experiment}", *settings])

        def heard(what: str) -> None:
            advance(f"{model.name}, {name}: {what}")

        found = longest(config, configured_target(config), heard, build=build, step=step)
        return None if found is None else found.report()

    found = {
        name: limit(
            name, BASELINE_STEP, transformers_baseline(gradient_checkpointing=checkpointing)
        )
        for name, checkpointing in (("vanilla", False), ("recompute", True))
    }
    found["mst"] = limit("mst", STEP, None)
    if model.name == OFFLOADED:
        found["offload"] = limit("offload", STEP, None, *OFFLOAD)
    return found


def several_gpus(
    advance: Advance, experiments: Mapping[tuple[str, int], str] = SEVERAL_GPUS
) -> dict[str, Any]:
    """Whether the paper's lengths fit several GPUs that share a sequence, and the longest that do.

    Predicted for one of them.
    """
    rows = []
    for (model, gpus), experiment in experiments.items():
        config = read([f"+experiment={experiment}"])
        target = configured_target(config)
        advance(f"{model} on {gpus} GPUs")
        limit = longest(config, target)
        rows.append(
            {
                "model": model,
                "gpus": gpus,
                "reported_tokens": config.data.sequence_length,
                "at_reported": predict(config, target).report(),
                "longest": limit and limit.report(),
            }
        )
    return {"rows": rows}


def over_all_lengths(
    advance: Advance, ways: Mapping[str, Sequence[str]] = WAYS, lengths: Sequence[int] = ()
) -> dict[str, Any]:
    """For each way the predictions over lengths; none given: the experiments' own."""
    found = {}
    for name, settings in ways.items():
        config = read(settings)
        chosen = lengths or config.plan.sweep
        predictions = over_lengths(config, chosen, configured_target(config), advance)
        found[name] = [prediction.report() for prediction in predictions]
    return {"ways": found}


def number_of_chunks(
    advance: Advance, lengths: Sequence[int] = CUT_LENGTHS, base: Sequence[str] = CUT
) -> dict[str, Any]:
    """Predictions for each length, kind and number of chunks; the other sizes are "auto"'s."""
    rows = []
    for length in lengths:
        for kind in KINDS:
            for count in COUNTS[kind]:
                advance(f"{kind} in {count} chunks at {length // K}K")
                config = read([*base, *cut_settings(kind, count, length)])
                report = predict(config, configured_target(config)).report()
                rows.append({"tokens": length, "kind": kind, "chunks": count} | report)
    return {"rows": rows}


def cut_settings(kind: str, count: int, length: int) -> list[str]:
    """The arguments for ``count`` chunks of a kind."""
    in_one_piece = [f"memory.block_chunk_tokens={length}"] if kind == "mlp" else []
    sizes = [f"{key}={length // count}" for key in KINDS[kind]]
    return [f"data.sequence_length={length}", *in_one_piece, *sizes]
