"""What is predicted, in sections: a table, a picture and what to know of them."""

import textwrap
from typing import Any

from mst_train.paper.reported import K, short_number
from mst_train.plan.show import gib, markdown
from mst_train.units import GIB, duration

Report = dict[str, Any]

LONGEST = """
    Predicted for {device}: bf16 weights and AdamW states, each weight updated in the backward,
    one sequence in a step, FlashAttention-2's memory. Assumed beside what is counted:
    {context:.1f} GiB for the CUDA context, {workspace:.0f} MiB for cuBLAS, and {unusable:.0%}
    that the allocator cannot use. "transformers" is its own model with its own loss, with and
    without its gradient checkpointing, to 256 tokens. "mst" is this project's `memory.policy=mst`
    with `memory.keep.attention=0`, to 1K. Offload: the kept activations wait in 512 GiB of
    host memory, the optimizer stays on the GPU. As a check of the predictions: those for
    transformers are between {near} of what the paper reports for vanilla and recomputation, with
    other versions.
"""
SEVERAL = """
    Predicted: settings and assumptions as above, and {communication:.1f} GiB on each GPU for
    communication. The GPUs share each sequence by the exchange that sends the least; each holds
    all weights and states. Such runs work on CPUs, by test; on GPUs they have not been run yet.
"""
LENGTHS = """
    Predicted for Llama3-8B on {device}, settings as above; bold fits. The picture ends at twice
    the device's memory. Times assume rates, none of them measured: {rates}.
"""
ABLATIONS = """
    Predicted for Llama3-8B on {device}, settings as above, attention's result kept; bold fits.
    What is not cut has the size that `auto` gives it. Where a line is flat, another part of the
    step sets the peak. The time counts the bytes that each chunk moves, but not that small matrix
    products run slower than large ones.
"""

WIDTH = 110
"""Of the page's lines."""


def prose(text: str, **values: Any) -> str:
    """One paragraph: ``text`` with its values."""
    words = " ".join(text.format(**values).split())
    return textwrap.fill(words, WIDTH, break_long_words=False, break_on_hyphens=False)


def longest(report: Report) -> list[str]:
    header = (
        "",
        "reported: vanilla",
        "reported: recomputation",
        "reported: mini-sequences",
        "predicted: transformers",
        "predicted: transformers, checkpointing",
        "predicted: mst",
        "predicted: mst, offload",
        "mst to transformers (checkpointing)",
        "mst to reported",
    )
    lines, baselines = [], ("vanilla", "recompute")
    for row in report["rows"]:
        reported, found = row["reported"], row["predicted"]
        lines.append(
            (
                reported["name"],
                *(_reported(reported, way) for way in ("vanilla", "recompute", "mst")),
                *(_tokens(found[way]) for way in baselines),
                f"**{_tokens(found['mst'])}**",
                _tokens(found["offload"]) if "offload" in found else "",
                "{} ({})".format(*(_times(found["mst"], _length(found[way])) for way in baselines)),
                _times(found["mst"], reported["mst"] * K),
            )
        )
    assumed = report["assumed"]
    about = prose(
        LONGEST,
        device=_device(report),
        context=assumed["context_bytes"] / GIB,
        workspace=assumed["workspace_bytes"] / 2**20,
        unusable=assumed["unusable_share"],
        near=_near_reported(report),
    )
    return ["![The longest sequences](longest.png)", markdown(header, lines), about]


def several(report: Report) -> list[str]:
    header = (
        "",
        "GPUs",
        "reported",
        "predicted at that length",
        "predicted: longest",
        "longest to reported",
    )
    lines = []
    for row in report["rows"]:
        there = row["at_reported"]
        verdict = "fits" if there["fits"] else "does not fit"
        lines.append(
            (
                row["model"],
                row["gpus"],
                f"{short_number(row['reported_tokens'])} †",
                f"{verdict}: {gib(there['peak_bytes'])} on each",
                f"**{_tokens(row['longest'])}**",
                _times(row["longest"], row["reported_tokens"]),
            )
        )
    communication = report["assumed"]["communication_bytes"] / GIB
    return [markdown(header, lines), prose(SEVERAL, communication=communication)]


def lengths(report: Report) -> list[str]:
    ways = report["ways"]
    header = ("tokens", *ways)
    lines = [
        (short_number(rows[0]["sequence_length"]), *map(_peak_and_step, rows))
        for rows in zip(*ways.values(), strict=True)
    ]
    about = prose(
        LENGTHS, device=_device(report), rates=report["assumed"]["rates"].removeprefix("assumed: ")
    )
    return ["![Memory over the length](lengths.png)", markdown(header, lines), about]


def ablations(report: Report) -> list[str]:
    names = {"head": "LM head", "mlp": "MLP, blocks in one piece", "block": "whole block"}
    cells = {(row["tokens"], row["chunks"], row["kind"]): row for row in report["rows"]}
    lines = []
    for tokens, chunks in dict.fromkeys((tokens, chunks) for tokens, chunks, _ in cells):
        found = [cells.get((tokens, chunks, kind)) for kind in names]
        lines.append((short_number(tokens), chunks, *map(_peak_and_step, found)))
    header = ("tokens", "chunks", *names.values())
    about = prose(ABLATIONS, device=_device(report))
    return ["![The number of chunks](ablations.png)", markdown(header, lines), about]


def _reported(reported: Report, way: str) -> str:
    return f"{reported[way]:g}K" + ("" if way in reported["confirmed"] else " †")


def _near_reported(report: Report) -> str:
    """Between what the predicted limits of transformers are, relative to the reported ones."""
    shares = [
        length / (row["reported"][way] * K)
        for row in report["rows"]
        for way in ("vanilla", "recompute")
        if (length := _length(row["predicted"][way]))
    ]
    return f"{min(shares):.2f} and {max(shares):.2f}" if shares else "none and none"


def _tokens(prediction: Report | None) -> str:
    return "none" if prediction is None else short_number(prediction["sequence_length"])


def _length(prediction: Report | None) -> int | None:
    return None if prediction is None else prediction["sequence_length"]


def _times(prediction: Report | None, tokens: float | None) -> str:
    """How many times longer than ``tokens``."""
    length = _length(prediction)
    return f"{length / tokens:.3g}x" if length and tokens else "none"


def _device(report: Report) -> str:
    assumed = report["assumed"]
    return f"{assumed['device']} ({assumed['device_bytes'] / GIB:.2f} GiB)"


def _peak_and_step(row: Report | None) -> str:
    if row is None:
        return ""
    text = f"{gib(row['peak_bytes'])}, {duration(row['predicted_step_seconds'])}"
    return f"**{text}**" if row["fits"] else text
