"""Line charts and stacked areas as SVG that takes its colours and its font from the page.

matplotlib draws with colours that stand for the page's CSS variables and are replaced by them, so
that one drawing serves the light and the dark page.
"""

import io
import math
import re
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mst_train.memory.tracker import KINDS
from mst_train.plan.plot import areas, new_figure
from mst_train.plan.show import short_length

INK, FAINT, GRID = "#010101", "#010102", "#010103"
LINES = [f"#0102{number:02x}" for number in range(6)]
AREAS = {kind: f"#0103{number:02x}" for number, kind in enumerate((*KINDS, "overhead"))}

VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    GRID: "--grid",
    **{color: f"--line-{number}" for number, color in enumerate(LINES)},
    **{color: f"--area-{kind}" for kind, color in AREAS.items()},
}
"""Which variable of the page each colour stands for."""

SIZE = (5.0, 2.8)
POINTS = 1200
"""About the most points of a curve."""

_SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "xtick.color": GRID,
    "xtick.labelcolor": FAINT,
    "ytick.color": GRID,
    "ytick.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
}

_STYLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.7},
    "medians": {"linewidth": 0.8, "alpha": 0.35},
    "points": {"marker": "o", "linewidth": 1.1, "markersize": 4},
    "rings": {"marker": "o", "linestyle": "", "markersize": 4.5, "markerfacecolor": "none"},
}


@dataclass(frozen=True)
class Curve:
    """Values ``y`` at ``x``.

    style: line, medians (a faint line, and its running medians), points (dots, joined) or rings
    (not joined).
    """

    x: Sequence[float]
    y: Sequence[float]
    color: str
    style: str = "line"


def line_chart(
    name: str,
    curves: Sequence[Curve],
    x_label: str,
    *,
    from_zero: bool = False,
    ticks: Sequence[str] | None = None,
) -> str:
    """Curves in one chart, as SVG.

    from_zero: show the whole of each value. ticks: words for x = 0, 1, 2, ...
    """

    def draw(axes: Any) -> None:
        for curve in curves:
            x, y = thin(curve.x, curve.y)
            alone = len(x) == 1 and curve.style in ("line", "medians")
            axes.plot(x, y, color=curve.color, **_STYLES["points" if alone else curve.style])
            if curve.style == "medians":
                smooth = thin(curve.x, medians(curve.y))
                axes.plot(*smooth, color=curve.color, **_STYLES["line"])
        if ticks is None:
            axes.xaxis.set_major_formatter(lambda value, _: short(value))
        else:
            axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlabel(x_label)
        if from_zero:
            axes.set_ylim(0, 1.1 * max(max(curve.y) for curve in curves) or 1)

    return _svg(name, draw)


def memory_chart(
    name: str, reports: Sequence[dict[str, Any]], measured: Sequence[tuple[int, float, str]]
) -> str:
    """Predicted parts of the peak over the length as areas, and what runs measured as dots.

    reports: as ``Prediction.report`` gives them, by length. measured: (length, GiB, colour).
    """

    from matplotlib.ticker import MultipleLocator

    def draw(axes: Any) -> None:
        lengths = [report["sequence_length"] for report in reports]
        if len(reports) > 1:
            areas(axes, lengths, reports, AREAS)
        for length, gib, color in measured:
            axes.plot([length], [gib], "o", markersize=8, color=color, markeredgecolor=INK)
        axes.set_xscale("log", base=2)
        ticks = sorted({*lengths, *(length for length, _, _ in measured)})
        axes.set_xticks(ticks, [short_length(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        step = 2 ** math.floor(math.log2(axes.get_ylim()[1] / 4))  # so that MiB are whole, too
        axes.yaxis.set_major_locator(MultipleLocator(step))
        axes.yaxis.set_major_formatter(lambda gib, _: memory_size(gib))
        axes.set_xlabel("tokens in a sequence")

    return _svg(name, draw)


def medians(values: Sequence[float]) -> list[float]:
    """The median of the values around each; a twentieth of them all, at least 5."""
    half = max(len(values) // 40, 2)
    around = sorted(values[:half])
    found = []
    for place in range(len(values)):
        if place + half < len(values):
            insort(around, values[place + half])
        if place > half:
            del around[bisect_left(around, values[place - half - 1])]
        middle = len(around) // 2
        found.append((around[middle] + around[-middle - 1]) / 2)
    return found


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most about POINTS points: the lowest and the highest of each stretch, in their order."""
    stretch = -(-2 * len(x) // POINTS)
    if stretch <= 2:
        return list(x), list(y)
    kept: list[int] = []
    for start in range(0, len(x), stretch):
        places = range(start, min(start + stretch, len(x)))
        kept += sorted({min(places, key=y.__getitem__), max(places, key=y.__getitem__)})
    return [x[place] for place in kept], [y[place] for place in kept]


def short(value: float) -> str:
    """A number for an axis: 1500000 as 1.5M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.6g}"


def memory_size(gib: float) -> str:
    """A number of GiB for an axis."""
    return f"{gib:g} GiB" if gib >= 1 else f"{1024 * gib:g} MiB" if gib else "0"


def _svg(name: str, draw: Callable[[Any], None]) -> str:
    import matplotlib

    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure = new_figure(*SIZE)
        axes = figure.subplots()
        axes.grid(axis="y", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
        draw(axes)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _at_home(file.getvalue(), name)


def _at_home(svg: str, name: str) -> str:
    """A drawing as a part of the page: without a size, colours and font of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    for size in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(name)}" ', 1).strip()
