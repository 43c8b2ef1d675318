"""The rows of a bench as Markdown and as a table for a terminal."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

REFERENCES = {"step": "recompute", "short": "vanilla", "systems": "transformers_checkpointing"}
"""The variant whose time is 1.00 in the tables; of peers, the fastest in each piece of work."""

LABELS = {
    "mst_without_keeping": "mst, attention recomputed",
    "mst_offload": "mst, offload to host",
    "transformers_checkpointing": "transformers, checkpointing",
    "alst": "transformers, DeepSpeed ALST",
    "liger": "transformers, Liger",
    "torch": "plain torch",
    "torch_linear_cross_entropy": "torch linear_cross_entropy",
    "torch_linear_cross_entropy_chunked": "torch linear_cross_entropy, chunked",
    "torch_linear_cross_entropy_compact": "torch linear_cross_entropy, small chunks",
    "liger_fused": "Liger fused linear cross-entropy",
    "cut_cross_entropy": "cut-cross-entropy",
    "deepspeed": "DeepSpeed tiled",
    "mst_matched": "mst, leanest peer's memory",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, and a row's text in it (None: nothing to say)."""

    title: str
    text: Callable[[Row], str | None]
    left: bool = False


def label(variant: str) -> str:
    """A variant's name for readers."""
    return LABELS.get(variant, variant)


def markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown page."""
    columns, rows = table(report)
    lines = [f"# {report['bench']}", "", *_about(report), ""]
    lines.append("| " + " | ".join(column.title for column in columns) + " |")
    lines.append("|" + "|".join("---" if column.left else "---:" for column in columns) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *_notes(report)]) + "\n"


def plain(report: dict[str, Any]) -> str:
    """The table for a terminal."""
    columns, rows = table(report)
    titles = [column.title for column in columns]
    widths = [max(len(cell) for cell in cells) for cells in zip(titles, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column.left else cell.rjust(width)
            for cell, width, column in zip(cells, widths, columns, strict=True)
        ).rstrip()
        for cells in [titles, *rows]
    )


def table(report: dict[str, Any]) -> tuple[list[Column], list[list[str]]]:
    """The columns that have something to say, and their cells."""
    rows: Sequence[Row] = report["rows"]
    kind, on_cpu = report["bench"], "gpu" not in report["hardware"]
    columns = [
        Column("work", lambda row: row["work"] if kind == "peers" else None, left=True),
        Column("tokens", lambda row: f"{row['tokens']:,}"),
        Column("variant", lambda row: label(row["variant"]), left=True),
        Column("time", lambda row: duration(row["median_seconds"])),
        Column("best", lambda row: duration(min(row["seconds"], default=None))),
        Column("CPU time", lambda row: duration(cpu_seconds(row)) if on_cpu else None),
        Column("relative", lambda row: _shown(relative(row, rows, kind), ".2f")),
        Column("tokens/s", lambda row: _shown(row.get("tokens_per_second"), ",.0f")),
        Column("MFU", lambda row: _shown(row.get("model_flops_utilization"), ".1%")),
        Column("predicted", lambda row: _shown(row.get("predicted_tokens"), ",.0f")),
        Column("peak", lambda row: size(row["peak_bytes"])),
        Column("predicted peak", lambda row: size(row.get("predicted_bytes"))),
        Column("host", lambda row: size(row.get("host_bytes") or None)),
        Column("loss", lambda row: _shown(row.get("loss"), ".6f")),
        Column("gradient error", lambda row: _shown(_worst(row), ".1e")),
        Column("note", lambda row: row["problem"] or row.get("note"), left=True),
    ]
    columns = [c for c in columns if any(c.text(row) is not None for row in rows)]
    return columns, [[column.text(row) or "" for column in columns] for row in rows]


def relative(row: Row, rows: Sequence[Row], kind: str) -> float | None:
    """The row's time as a multiple of the one that it is compared with."""
    same = [r for r in rows if (r["work"], r["tokens"]) == (row["work"], row["tokens"])]
    if kind == "peers":
        same = [r for r in same if r["peer"]]
    else:
        same = [r for r in same if r["variant"] == REFERENCES.get(kind)]
    reference = min((r["median_seconds"] for r in same if r["median_seconds"]), default=None)
    return reference and row["median_seconds"] and row["median_seconds"] / reference


def cpu_seconds(row: Row) -> float | None:
    """What all threads computed, the median of the repetitions."""
    return statistics.median(row["cpu_seconds"]) if row["cpu_seconds"] else None


def duration(seconds: float | None) -> str | None:
    """A time with its unit: three digits that count."""
    if seconds is None:
        return None
    return f"{_digits(seconds * 1000)} ms" if seconds < 1 else f"{_digits(seconds)} s"


def size(count: float | None) -> str | None:
    """Bytes in MiB or GiB."""
    if count is None:
        return None
    mib = count / 2**20
    return f"{_digits(mib / 1024)} GiB" if mib >= 1024 else f"{_digits(mib)} MiB"


def compared(kind: str) -> str:
    """What times are compared with, where it is the same for all rows."""
    return label(REFERENCES[kind]) if kind in REFERENCES else "the fastest of others"


def subject(report: dict[str, Any]) -> str:
    """The machine, the type and the layers that were measured."""
    hardware, settings = report["hardware"], report["settings"]
    machine = hardware.get("gpu") or f"{hardware['cpu']}, threads: {hardware['threads']}"
    layers = "" if report["bench"] == "peers" else f"{settings['model']['num_layers']} layers, "
    return f"{machine}; {settings['precision']}; {layers}"


def experts(report: dict[str, Any]) -> str:
    """How many experts there are and a token has, where it has."""
    model = report["settings"]["model"]
    count = model.get("num_experts")
    return (
        ""
        if count is None
        else f" in each of {count} experts, {model['experts_per_token']} a token"
    )


def _digits(number: float) -> str:
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def _shown(number: float | None, form: str) -> str | None:
    return None if number is None else format(number, form)


def _worst(row: Row) -> float | None:
    return max(row.get("gradient_errors", {}).values(), default=None)


def _about(report: dict[str, Any]) -> list[str]:
    hardware, versions, model = report["hardware"], report["versions"], report["settings"]["model"]
    return [
        f"{subject(report)}hidden {model['hidden_size']:,}, intermediate "
        f"{model['intermediate_size']:,}{experts(report)}, vocabulary {model['vocab_size']:,}.",
        "",
        f"`{report['command']}`, {report['date']}, commit {report['git_commit'] or 'unknown'}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; load average at the start {hardware['load_average']}.",
    ]


def _notes(report: dict[str, Any]) -> list[str]:
    kind = report["bench"]
    if kind == "max_sequence":
        return [
            "Tokens: the longest sequence of a training step that fits, in multiples of 1,024. "
            "Peak: all tensors of the step, weights and states among them, at that length; "
            "predicted peak: what the planner says of the same length.",
            *(f"**Problem:** {problem}." for problem in report["problems"]),
        ]
    counts = sorted({len(row["seconds"]) for row in report["rows"] if row["seconds"]})
    repetitions = " to ".join(str(n) for n in dict.fromkeys((counts or [0])[:1] + counts[-1:]))
    compared = (
        "the fastest implementation of others"
        if kind == "peers"
        else f"that of {label(REFERENCES[kind])}"
    )
    lines = [
        f"Time: median of {repetitions} repetitions, forward and backward. "
        f"Relative: to {compared}. "
        f"Peak: device memory beyond weights, inputs and what else was there before."
    ]
    if "gpu" not in report["hardware"]:
        lines.append(
            "CPU time: of all threads together; where others use the machine, it is steadier."
        )
    if kind == "systems":
        lines.append(
            "Gradient error: the largest relative difference (Frobenius norm) from the first "
            "variant's gradients among " + ", ".join(report["compared_gradients"]) + "."
        )
    if kind == "peers":
        lines.append("Gradient error: the largest relative Frobenius norm against float64.")
    return [*lines, *(f"**Problem:** {problem}." for problem in report["problems"])]
