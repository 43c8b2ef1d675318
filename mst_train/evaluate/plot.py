"""The tasks' answers as a picture: by length, and by depth where a task has one."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

INK = "#2b2f36"
LINE = "#1c7ed6"
FAINT = "#868e96"
WIDTH, HEIGHT = 4.2, 1.9
"""Inches, of a panel: on a phone its letters are as large as a page's."""
LIGHT = 0.55
"""Shares above it are so dark a blue that what is written on them is white."""


def picture(result: dict[str, Any]) -> bytes:
    """``figure`` as a PNG."""
    file = BytesIO()
    figure(result).savefig(file, format="png", dpi=200, facecolor="white")
    return file.getvalue()


def figure(result: dict[str, Any]) -> Any:
    """A panel for each task of an evaluation: a map of lengths and depths, or a line over lengths.

    Both show the share of the answers' tokens that are right. Texts that are longer than the
    sequences that the model was trained on stand behind a dotted line.
    """
    from matplotlib.figure import Figure

    trained = result["trained_sequence_length"]
    tasks = [task for task in result["tasks"] if result[task]]
    drawn = Figure(figsize=(WIDTH, HEIGHT * len(tasks)), layout="constrained")
    panels = drawn.subplots(len(tasks), squeeze=False)[:, 0]
    for axes, task in zip(panels, tasks, strict=True):
        places, chance = result[task], result[f"{task}_chance"]
        lengths = sorted({place["length"] for place in places})
        if "depth" in places[0]:
            _map(axes, places, lengths)
        else:
            _line(axes, places, lengths, chance)
        names = [f"{length:,}" for length in lengths]
        axes.set_xticks(range(len(lengths)), names)
        axes.set_xlim(-0.5, len(lengths) - 0.5)
        about = f"{task}, {chance:.0%} by chance"
        axes.set_title(about, loc="left", fontsize=9, color=INK)
        longer = sum(trained is None or length <= trained for length in lengths) - 0.5
        if longer < len(lengths) - 0.5:
            axes.axvline(longer, color=INK, linewidth=1.2, linestyle=":")
        axes.tick_params(labelsize=8, colors=INK, length=2)
        axes.spines[:].set_visible(False)
    notes = [] if trained is None else [f"dotted: trained on {trained:,}"]
    notes += ["dashed: chance"] if any("depth" not in result[task][0] for task in tasks) else []
    note = f" ({'; '.join(notes)})" if notes else ""
    panels[-1].set_xlabel(f"tokens in the text{note}", fontsize=8, color=INK)
    return drawn


def _map(axes: Any, places: Sequence[dict[str, Any]], lengths: Sequence[int]) -> None:
    depths = sorted({place["depth"] for place in places})
    found = {(place["depth"], place["length"]): place["accuracy"] for place in places}
    shares = [[found[depth, length] for length in lengths] for depth in depths]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            color = "white" if share > LIGHT else INK
            where = {"ha": "center", "va": "center", "fontsize": 8, "color": color}
            axes.text(column, row, f"{share:.0%}", **where)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_ylabel("at depth", fontsize=8, color=INK)


def _line(
    axes: Any, places: Sequence[dict[str, Any]], lengths: Sequence[int], chance: float
) -> None:
    found = {place["length"]: place["accuracy"] for place in places}
    shares = [found[length] for length in lengths]
    axes.plot(shares, "o-", color=LINE, markersize=4, linewidth=1.5, clip_on=False)
    for column, share in enumerate(shares):
        where = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(f"{share:.0%}", (column, share), color=INK, **where)
    axes.axhline(chance, color=FAINT, linewidth=1, linestyle="--")
    axes.set_ylim(0, 1.15)
    axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.grid(axis="y", color="#e9ecef", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylabel("tokens right", fontsize=8, color=INK)
