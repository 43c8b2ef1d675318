"""The pictures of what is measured, each drawn from its piece's report."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mst_train.paper.plot import COLORS, FAINT, NAMES, plain, save, title
from mst_train.plan.plot import INK, new_figure

Report = dict[str, Any]

LONG, SHORT = COLORS["mst"], COLORS["recompute"]
RUNS = {"mst": LONG, "short": SHORT}


def draw_reach(report: Report, path: Path) -> None:
    """A bar for each window, with how much lower its loss is than the bar's before."""
    figure = new_figure(7, 3.2)
    axes = figure.subplots()
    losses = [row["loss"] for row in report["losses"]]
    bars = axes.bar(range(len(losses)), losses, width=0.6, color=LONG)
    axes.bar_label(bars, [f"{loss:.3f}" for loss in losses], fontsize=9, color=INK)
    windows = [f"{row['window']:,}" for row in report["losses"]]
    axes.set_xticks(range(len(losses)), windows)
    axes.set_xlabel("tokens of its own past that are counted, beside the training text", color=INK)
    title(axes, "an n-gram model's loss in nats per token")
    plain(axes)
    save(figure, path)


def draw_convergence(report: Report, path: Path) -> None:
    """Four panels: the method against vanilla, and long sequences against short ones."""
    figure = new_figure(10, 7)
    (same, by_place), (by_tokens, by_time) = figure.subplots(2, 2)
    _draw_same(same, report)
    _draw_places(by_place, report)
    _draw_validation(by_tokens, report, time=False)
    _draw_validation(by_time, report, time=True)
    save(figure, path)


def _draw_same(axes: Any, report: Report) -> None:
    first = report["seeds"][0]
    for name, width, color in (("vanilla", 4.5, "#c3cad2"), ("mst", 1.3, LONG)):
        losses = first["runs"][name]["losses"]
        x = _millions(range(1, len(losses) + 1), report)
        axes.plot(x, losses, linewidth=width, color=color, label=NAMES[name])
    _describe(axes, f"training loss on {report['long']:,} tokens: the method and vanilla")
    seeds, found = len(report["seeds"]), report["relative_difference"]
    axes.annotate(
        f"largest difference, of {seeds} seeds:\n{found['fp32']:.1e} of the loss; in float64\n"
        f"{found['float64']:.1e} in the first {report['exact_steps']} steps",
        (0.98, 0.55),
        xycoords="axes fraction",
        ha="right",
        fontsize=9,
        color=FAINT,
    )


def _draw_places(axes: Any, report: Report) -> None:
    short = report["short"]
    for name, color in RUNS.items():
        for context, style in (("long", "-"), ("short", "--")):
            losses = _means([one["final"][name]["by_position"][context] for one in report["seeds"]])
            x = [short * (place + 0.5) for place in range(len(losses))]
            label = f"{_trained_on(report, name)}, sees {report[context]:,}"
            axes.plot(x, losses, style, marker="o", markersize=3, color=color, label=label)
    _describe(axes, "held-out loss by position, after training", "position in the sequence")
    axes.set_ylim(bottom=None, top=axes.get_ylim()[0] + 1.45 * _height(axes))
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.set_xlim(0, report["long"])


def _height(axes: Any) -> float:
    low, high = axes.get_ylim()
    return float(high - low)


def _draw_validation(axes: Any, report: Report, *, time: bool) -> None:
    for name, color in RUNS.items():
        runs = [one["runs"][name] for one in report["seeds"]]
        steps = [point["step"] for point in runs[0]["validation"]]
        second = statistics.fmean(run["median_step_seconds"] for run in runs)
        x = [step * second for step in steps] if time else _millions(steps, report)
        for run in runs:
            axes.plot(x, _losses(run), color=color, linewidth=0.7, alpha=0.45)
        means = _means([_losses(run) for run in runs])
        axes.plot(x, means, marker="o", markersize=4, color=color, label=_trained_on(report, name))
    name = f"held-out loss, each at its own length, over {'time' if time else 'tokens'}"
    _describe(axes, name, "seconds of training" if time else "million tokens")
    axes.set_xlim(left=0)


def _losses(run: Report) -> list[float]:
    return [point["loss"] for point in run["validation"]]


def _means(seeds: Sequence[Sequence[float]]) -> list[float]:
    """Of all seeds, place by place."""
    return [statistics.fmean(at) for at in zip(*seeds, strict=True)]


def _describe(axes: Any, name: str, x_label: str = "million tokens") -> None:
    title(axes, name)
    axes.set_xlabel(x_label, color=INK)
    axes.legend(frameon=False, fontsize=9)
    plain(axes)


def _trained_on(report: Report, name: str) -> str:
    return f"trained on {report['long' if name == 'mst' else 'short']:,} tokens"


def _millions(steps: Sequence[int], report: Report) -> list[float]:
    return [step * report["tokens_per_step"] / 1e6 for step in steps]
