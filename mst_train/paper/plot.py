"""The pictures of what is predicted, each drawn from its piece's report."""

from pathlib import Path
from typing import Any

from mst_train.paper.reported import K, short_number
from mst_train.plan.plot import INK, new_figure, stack
from mst_train.units import GIB

Report = dict[str, Any]

FAINT = "#6b7280"
GRID = "#e5e7eb"
COLORS = {
    "vanilla": "#8a94a0",
    "recompute": "#d97706",
    "mst": "#1f6fb2",
    "offload": "#16a34a",
}
NAMES = {
    "vanilla": "vanilla",
    "recompute": "activation recomputation",
    "mst": "mini-sequences",
    "offload": "mini-sequences, offload to the host",
}
KINDS = {
    "head": ("LM head", "#be123c", "o"),
    "mlp": ("MLP, blocks in one piece", "#d97706", "s"),
    "block": ("whole block", "#1f6fb2", "^"),
}


def draw_longest(report: Report, path: Path) -> None:
    """A row for each model: hollow marks are reported lengths, full ones predicted."""
    figure = new_figure(10, 1.3 + 0.62 * len(report["rows"]))
    axes = figure.subplots()
    for place, row in enumerate(report["rows"]):
        found = row["predicted"].items()
        predicted = {way: at["sequence_length"] for way, at in found if at}
        reported = {way: row["reported"][way] * K for way in ("vanilla", "recompute", "mst")}
        for lengths, height in ((predicted, place - 0.17), (reported, place + 0.17)):
            for way, tokens in lengths.items():
                _mark(axes, tokens, height, COLORS[way], full=lengths is predicted)
        axes.axhline(place + 0.5, color=GRID, linewidth=0.8)
    axes.set_yticks(range(len(report["rows"])), [r["reported"]["name"] for r in report["rows"]])
    axes.set_ylim(len(report["rows"]) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xscale("log", base=2)
    ticks = [2**power * K for power in range(11)]
    axes.set_xticks(ticks, [short_number(tick) for tick in ticks])
    axes.set_xlim(K, 2**10.6 * K)
    axes.minorticks_off()
    plain(axes, grid="x")
    axes.set_xlabel("tokens in a sequence, on one 80 GB GPU", color=INK)
    _legend_of_marks(figure)
    save(figure, path)


def _mark(axes: Any, tokens: float, height: float, color: str, *, full: bool) -> None:
    axes.plot(
        [tokens],
        [height],
        marker="o",
        markersize=8,
        color=color,
        markerfacecolor=color if full else "white",
        markeredgewidth=1.6,
    )
    axes.annotate(
        short_number(tokens),
        (tokens, height),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=INK,
    )


def _legend_of_marks(figure: Any) -> None:
    from matplotlib.lines import Line2D

    def mark(label: str, color: str, face: str) -> Any:
        return Line2D([], [], marker="o", linestyle="", color=color, mfc=face, label=label)

    marks = [mark(NAMES[way], color, color) for way, color in COLORS.items()]
    marks += [mark("predicted", INK, INK), mark("reported", INK, "white")]
    figure.legend(handles=marks, loc="outside upper left", ncols=6, frameon=False, fontsize=8.5)


def draw_lengths(report: Report, path: Path) -> None:
    """A panel of stacked areas for each way, cut off at twice what the device has."""
    ways = report["ways"]
    figure = new_figure(3.3 * len(ways), 4.2)
    panels = figure.subplots(1, len(ways), sharey=True, squeeze=False)[0]
    for axes, (name, rows) in zip(panels, ways.items(), strict=True):
        stack(axes, rows)
        title(axes, name)
        axes.xaxis.label.set_fontsize(9)
        axes.set_ylim(0, 2 * rows[0]["budget_bytes"] / GIB)
    panels[0].set_ylabel("GiB at the peak, predicted", color=INK)
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles, loc="outside lower left", ncols=8, frameon=False, fontsize=9
    )
    save(figure, path)


def draw_ablations(report: Report, path: Path) -> None:
    """Peak, and time relative to one chunk, over the number of chunks, a row for each length."""
    lengths = list(dict.fromkeys(row["tokens"] for row in report["rows"]))
    counts = sorted({row["chunks"] for row in report["rows"]})
    figure = new_figure(10, 0.8 + 2.7 * len(lengths))
    panels = figure.subplots(len(lengths), 2, squeeze=False, sharex=True)
    for (left, right), length in zip(panels, lengths, strict=True):
        for kind, (name, color, marker) in KINDS.items():
            rows = [r for r in report["rows"] if (r["tokens"], r["kind"]) == (length, kind)]
            one = rows[0]["predicted_step_seconds"]
            for axes, values in (
                (left, [row["peak_bytes"] / GIB for row in rows]),
                (right, [100 * (row["predicted_step_seconds"] / one - 1) for row in rows]),
            ):
                chunks = [row["chunks"] for row in rows]
                axes.plot(chunks, values, marker=marker, markersize=5, color=color, label=name)
        title(left, f"{short_number(length)} tokens: GiB at the peak")
        title(right, f"{short_number(length)} tokens: time of a step, beyond one chunk's")
        right.yaxis.set_major_formatter(lambda value, _: f"{value:+.0f}%" if value else "0%")
        right.set_ylim(-1, 13)
        left.margins(y=0.12)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.minorticks_off()
            plain(axes)
    for axes in panels[-1]:
        axes.set_xlabel("chunks", color=INK)
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    save(figure, path)


def title(axes: Any, text: str) -> None:
    """On the left, above."""
    axes.set_title(text, loc="left", fontsize=10, color=INK)


def plain(axes: Any, grid: str = "y") -> None:
    """Two axes and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Any, path: Path) -> None:
    """As PNG, for screens with many dots."""
    figure.savefig(path, dpi=150, facecolor="white")
