"""Plots of predictions: what the memory holds, over the sequence's length."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mst_train.plan.predict import LABELS, Prediction
from mst_train.plan.show import short_length
from mst_train.units import GIB

COLORS = {
    "parameters": "#334e68",
    "gradients": "#829ab1",
    "optimizer": "#627d98",
    "checkpoints": "#2f9e44",
    "working_set": "#f08c00",
    "head": "#e03131",
    "other": "#adb5bd",
    "overhead": "#dee2e6",
}
INK = "#2b2f36"


def draw_memory(predictions: Sequence[Prediction], path: Path, title: str) -> None:
    """Draw ``memory_figure`` into an image file."""
    figure = memory_figure([prediction.report() for prediction in predictions], title)
    figure.savefig(path, dpi=160, facecolor="white")


def memory_figure(reports: Sequence[dict[str, Any]], title: str) -> Any:
    """Stacked areas of the peak's parts against length, with the device's limit as a line.

    reports: as ``Prediction.report`` gives them, in any order; each has a dot and a tick.
    """
    figure = new_figure(9, 4.5)
    axes = figure.subplots()
    reports = sorted(reports, key=lambda report: report["sequence_length"])
    stack(axes, reports)
    lengths = [report["sequence_length"] / 1024 for report in reports]
    peaks = [report["peak_bytes"] / GIB for report in reports]
    axes.plot(lengths, peaks, "o", color=INK, markersize=4, clip_on=False)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short_length(report["sequence_length"]) for report in reports])
    axes.minorticks_off()
    axes.set_xlabel("tokens in a sequence", color=INK)
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, reverse=True)
    axes.set_ylabel("GiB on each device at the peak", color=INK)
    return figure


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches, for a file."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def areas(
    axes: Any,
    lengths: Sequence[float],
    reports: Sequence[dict[str, Any]],
    colors: Mapping[str, str],
) -> None:
    """The parts of the peak in GiB at these lengths; reports: as ``Prediction.report`` gives."""
    parts = [report["breakdown"] for report in reports]
    kinds = [kind for kind in colors if any(part[kind] for part in parts)]
    axes.stackplot(
        lengths,
        [[part[kind] / GIB for part in parts] for kind in kinds],
        labels=[LABELS[kind] for kind in kinds],
        colors=[colors[kind] for kind in kinds],
        linewidth=0,
    )


def stack(axes: Any, reports: Sequence[dict[str, Any]]) -> None:
    """The areas and the device's limit."""
    from matplotlib.patheffects import withStroke

    lengths = [report["sequence_length"] / 1024 for report in reports]
    if len(lengths) == 1:  # an area needs a width: a column
        areas(axes, [lengths[0] / 1.2, lengths[0] * 1.2], [*reports, *reports], COLORS)
    else:
        areas(axes, lengths, reports, COLORS)
    limit = reports[0]["budget_bytes"] / GIB
    halo = [withStroke(linewidth=2.5, foreground="white")]  # legible over any area
    axes.axhline(limit, color=INK, linewidth=1, linestyle="--")
    axes.annotate(
        f"{reports[0]['device']}: {limit:.0f} GiB",
        (1, limit),
        xycoords=axes.get_yaxis_transform(),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=INK,
        path_effects=halo,
    )
    axes.set_xlabel("tokens in a sequence (K: 1,024)", color=INK)
    axes.margins(x=0)
    if len(lengths) == 1:
        axes.set_xlim(lengths[0] / 2, lengths[0] * 2)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
