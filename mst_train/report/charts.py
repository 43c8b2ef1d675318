"""Line charts and stacked areas as SVG that takes its colours and its font from the page.

matplotlib draws with colours that stand for the page's CSS variables and are replaced by them, so
that one drawing serves the light and the dark page. A chart of lines has its values in its
attribute data-chart, from which charts.js, in the page, tells and draws them anew.
"""

import io
import json
import math
import re
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
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
"""About the most points of a curve that is drawn."""
HELD = 4000
"""About the most points of a curve whose values the page holds."""
SCRIPT = Path(__file__).with_suffix(".js").read_text("utf-8")

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
    """Values ``y`` at ``x``, which ascends; name: whose they are, where that is not plain.

    style: line, medians (a faint line, and its running medians), points (dots, joined) or rings
    (not joined).
    """

    x: Sequence[float]
    y: Sequence[float]
    color: str
    style: str = "line"
    name: str = ""


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

    held = {"label": x_label, "zero": from_zero, "curves": [_held(curve) for curve in curves]}
    return _svg(name, draw, held | ({"ticks": list(ticks)} if ticks else {}))


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
    """At most about POINTS of the points."""
    kept = _sticking_out(y, POINTS)
    return [x[place] for place in kept], [y[place] for place in kept]


def _sticking_out(y: Sequence[float], points: int) -> Sequence[int]:
    """Places of at most about so many values: the lowest and the highest of each stretch."""
    stretch = -(-2 * len(y) // points)
    if stretch <= 2:
        return range(len(y))
    kept: list[int] = []
    for start in range(0, len(y), stretch):
        places = range(start, min(start + stretch, len(y)))
        kept += sorted({min(places, key=y.__getitem__), max(places, key=y.__getitem__)})
    return kept


def _held(curve: Curve) -> dict[str, Any]:
    """A curve as charts.js reads it; values have six digits."""
    kept = _sticking_out(curve.y, HELD)

    def some(values: Sequence[float]) -> list[float]:
        return [float(f"{values[place]:.6g}") for place in kept]

    return {
        "name": curve.name,
        "style": curve.style,
        "color": curve.color,
        "x": [curve.x[place] for place in kept],
        "y": some(curve.y),
        "medians": some(medians(curve.y)) if curve.style == "medians" else None,
    }


def short(value: float) -> str:
    """A number for an axis: 1500000 as 1.5M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.6g}"


def memory_size(gib: float) -> str:
    """A number of GiB for an axis."""
    return f"{gib:g} GiB" if gib >= 1 else f"{1024 * gib:g} MiB" if gib else "0"


def _svg(name: str, draw: Callable[[Any], None], held: dict[str, Any] | None = None) -> str:
    """held: what charts.js needs of the chart, beside where the axes are."""
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
    attributes = {"role": "img", "aria-label": name}
    if held:
        width, height = (72 * size for size in SIZE)
        place = axes.get_position()
        box = place.x0 * width, height - place.y1 * height, place.x1 * width
        held |= {"box": [*box, height - place.y0 * height]}
        held |= {"x": axes.get_xlim(), "y": axes.get_ylim()}
        attributes["data-chart"] = json.dumps(held, separators=(",", ":"))
    return _at_home(file.getvalue(), attributes)


def _at_home(svg: str, attributes: Mapping[str, str]) -> str:
    """A drawing as a part of the page: without a size, colours and font of its own."""
    given = " ".join(f'{name}="{escape(value)}"' for name, value in attributes.items())
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    for size in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", f"<svg {given} ", 1).strip()
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
