"""Plots of a bench's results; needs matplotlib and the results alone.

python -m mst_train.bench.plot results.json [plot.png]
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mst_train.bench.report import Row, compared, duration, experts, label, relative, size, subject
from mst_train.plan.plot import INK, new_figure
from mst_train.plan.show import short_length

OURS = "#1f6fb2"
OTHERS = "#9aa5b1"
LINES = ("#6b7280", "#d97706", "#1f6fb2", "#16a34a", "#9333ea", "#be123c")

PEAK = "peak memory beyond weights and inputs"

TITLES = {
    "step": "One training step under each memory policy",
    "short": "One training step, down to short sequences",
    "systems": "One training step in each system",
    "peers": "Forward and backward of the LM head with its loss, and of the MLP",
    "max_sequence": "The longest sequence that fits",
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw a report into an image file. Raises ImportError where matplotlib is missing."""
    longest = report["bench"] == "max_sequence"
    rows = [row for row in report["rows"] if row["tokens"] if longest or row["median_seconds"]]
    cases = list(dict.fromkeys((row["work"], row["tokens"]) for row in rows))
    figure = new_figure(10, 4)
    if not cases:
        figure.text(0.5, 0.5, "nothing could be measured", ha="center", color=INK)
    elif longest:
        _longest(figure, rows)
    elif report["bench"] == "peers" or len(cases) == 1:
        _bars(figure, report, rows, cases)
    else:
        _lines(figure, report, rows)
    figure.suptitle(TITLES[report["bench"]], x=0.01, ha="left", fontsize=13, color=INK)
    figure.supxlabel(_caption(report), x=0.01, ha="left", fontsize=8, color="#6b7280")
    figure.savefig(path, dpi=160, facecolor="white")


def _longest(figure: Any, rows: Sequence[Row]) -> None:
    """Measured and predicted lengths, a pair of bars for each variant."""
    axes = figure.subplots()
    places = range(len(rows), 0, -1)
    axes.barh([p + 0.2 for p in places], [r["tokens"] / 1024 for r in rows], 0.36, color=OURS)
    predicted = [(r["predicted_tokens"] or 0) / 1024 for r in rows]
    axes.barh([p - 0.2 for p in places], predicted, 0.36, color=OTHERS)
    axes.set_yticks(list(places), [label(row["variant"]) for row in rows])
    axes.set_xlabel("thousands of tokens (1,024): blue measured, grey predicted", color=INK)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(figure: Any, report: dict[str, Any], rows: Sequence[Row], cases: list[Any]) -> None:
    """Time beside peak memory, a bar for each variant; a pair of panels for each case."""
    groups = [[row for row in rows if (row["work"], row["tokens"]) == case] for case in cases]
    figure.set_size_inches(10, 1.4 + sum(0.36 * len(group) + 0.7 for group in groups))
    panels = figure.subplots(
        len(groups), 2, squeeze=False, height_ratios=[len(group) + 1 for group in groups]
    )
    for (left, right), group, (work, tokens) in zip(panels, groups, cases, strict=True):

        def time_text(row: Row) -> str:
            ratio = relative(row, rows, report["bench"])
            return (duration(row["median_seconds"]) or "") + (f"   {ratio:.2f}" if ratio else "")

        name = f"{work}, {tokens:,} tokens" if report["bench"] == "peers" else f"{tokens:,} tokens"
        _bar_panel(left, group, lambda row: row["median_seconds"], time_text)
        left.set_title(f"{name}: time", loc="left", fontsize=9, color=INK)
        _bar_panel(right, group, lambda row: (row["peak_bytes"] or 0) / 2**30, _memory_text)
        right.set_yticklabels([])
        right.set_title(PEAK, loc="left", fontsize=9, color=INK)


def _bar_panel(
    axes: Any, rows: Sequence[Row], value: Callable[[Row], float], text: Callable[[Row], str]
) -> None:
    places = range(len(rows), 0, -1)
    values = [value(row) for row in rows]
    colors = [OURS if row["variant"].startswith("mst") else OTHERS for row in rows]
    axes.barh(places, values, color=colors, height=0.68)
    for place, row, number in zip(places, rows, values, strict=True):
        axes.annotate(
            text(row),
            (number, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK,
        )
    axes.set_yticks(places, [label(row["variant"]) for row in rows], fontsize=9, color=INK)
    axes.set_xlim(0, max(values) * 1.35)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color("#d1d5db")


def _memory_text(row: Row) -> str:
    host = size(row.get("host_bytes") or None)
    return (size(row["peak_bytes"]) or "unknown") + (f", and {host} on the host" if host else "")


def _lines(figure: Any, report: dict[str, Any], rows: Sequence[Row]) -> None:
    """Relative time and peak memory over the sequence length, a line for each variant."""
    left, right = figure.subplots(1, 2)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    ends: dict[Any, list[tuple[Any, ...]]] = {left: [], right: []}
    for variant, color in zip(variants, LINES, strict=False):
        own = [row for row in rows if row["variant"] == variant]
        for axes, value in (
            (left, lambda row: relative(row, rows, report["bench"])),
            (right, lambda row: row["peak_bytes"] and row["peak_bytes"] / 2**30),
        ):
            points = [(row["tokens"], value(row)) for row in own if value(row)]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color)
                ends[axes].append((*points[-1], label(variant), color))
    tokens = sorted({row["tokens"] for row in rows})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [short_length(t) for t in tokens], fontsize=9)
        axes.minorticks_off()
        axes.set_xlabel("tokens in the sequence", fontsize=9, color=INK)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylim(bottom=0)
    title = f"time relative to {compared(report['bench'])}"
    left.set_title(title, loc="left", fontsize=10, color=INK)
    peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"]] or [1]
    right.set_yscale("log", base=4 if max(peaks) > 16 * min(peaks) else 2)
    right.minorticks_off()
    right.yaxis.set_major_formatter(lambda value, _: size(value * 2**30))
    right.set_title(PEAK, loc="left", fontsize=10, color=INK)
    figure.draw_without_rendering()
    for axes, labels in ends.items():
        _label_ends(axes, labels)


def _label_ends(axes: Any, ends: Sequence[tuple[Any, ...]]) -> None:
    """Each line's name beside its last point, moved apart where they would overlap."""
    apart = 11.0  # points
    scale = 72 / axes.figure.dpi
    places = [(axes.transData.transform((x, y))[1] * scale, x, y, n, c) for x, y, n, c in ends]
    below = -float("inf")
    for height, x, y, name, color in sorted(places):
        wanted = max(height, below + apart)
        below = wanted
        axes.annotate(
            name,
            (x, y),
            xytext=(7, wanted - height),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
            annotation_clip=False,
        )


def _caption(report: dict[str, Any]) -> str:
    model = report["settings"]["model"]
    text = (
        f"{subject(report)}hidden {model['hidden_size']}, intermediate "
        f"{model['intermediate_size']}{experts(report)}, vocabulary {model['vocab_size']}; torch "
        f"{report['versions']['torch']}"
    )
    if report["bench"] != "max_sequence":
        text += f"\nMedians; ratios to {compared(report['bench'])}"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Draw a results file; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m mst_train.bench.plot results.json [plot.png]", file=sys.stderr)
        return 2
    source = Path(arguments[0])
    target = Path(arguments[1]) if arguments[1:] else source.with_suffix(".png")
    try:
        draw(json.loads(source.read_text()), target)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {source} is not a bench's results: {error!r}", file=sys.stderr)
        return 2
    except ImportError:
        print("error: matplotlib is not installed: pip install matplotlib", file=sys.stderr)
        return 1
    print(f"Plot: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
