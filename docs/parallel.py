"""Draws parallel.png, who holds what of a shared sequence, by the code that shares it:
python docs/parallel.py
"""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mst_train.mst.sharing import Places
from mst_train.mst.sharing.heads import Heads
from mst_train.mst.sharing.keys import KeyMap
from mst_train.plan.plot import INK, new_figure

PICTURE = Path(__file__).with_suffix(".png")
EXCHANGES = {"heads": (4, 1), "both: 2 nodes of 2": (2, 2), "keys": (1, 4)}
COLORS = ["#1f6fb2", "#d97706", "#16a34a", "#be123c"]
TOKENS, HEADS, WINDOW = 64, 8, 12

Area = tuple[int, slice, slice]
"""A process's tokens and heads."""


def figure() -> Figure:
    """What each of four processes has outside attention, in it, and gets of others' keys for it."""
    rows = {
        "outside attention:\nwhose tokens": _outside,
        "in attention:\nwhose queries": _inside,
        "keys that process 0 gets,\nby whose they are": _keys,
        f"the same in a window\nof {WINDOW} of {TOKENS} tokens": _keys_in_window,
    }
    drawn = new_figure(10, 6.4)
    grid = drawn.subplots(len(rows), len(EXCHANGES), sharex=True, sharey=True)
    for column, (name, (heads, keys)) in enumerate(EXCHANGES.items()):
        for axes, (words, areas) in zip(grid[:, column], rows.items(), strict=True):
            _draw(axes, [area for n in range(4) for area in areas(Places(heads, keys, n))])
            if column == 0:
                axes.set_ylabel(words, color=INK, rotation=0, ha="right", va="center", labelpad=28)
        grid[0, column].set_title(name, fontsize=11, color=INK)
        grid[-1, column].set_xlabel("tokens", color=INK)
    return drawn


def _outside(places: Places) -> Iterator[Area]:
    for part in places.own(TOKENS):
        yield places.rank, part, slice(0, HEADS)


def _inside(places: Places) -> Iterator[Area]:
    share = Heads(HEADS, HEADS, places.heads).share(places.rank % places.heads)
    for piece in places.pieces(TOKENS, places.node):
        yield places.rank, piece, share.queries


def _keys(places: Places, window: int | None = None) -> Iterator[Area]:
    """Those of process 0, by whose they are."""
    share = Heads(HEADS, HEADS, places.heads).share(0)
    seen = KeyMap(Places(places.heads, places.keys), TOKENS, window).spans
    for part in places.own(TOKENS):
        for span in seen:
            start, stop = max(part.start, span.start), min(part.stop, span.stop)
            if start < stop:
                yield places.rank, slice(start, stop), share.keys


def _keys_in_window(places: Places) -> Iterator[Area]:
    return _keys(places, WINDOW)


def _draw(axes: Axes, areas: list[Area]) -> None:
    for process, tokens, heads in areas:
        width, height = tokens.stop - tokens.start, heads.stop - heads.start
        corner = tokens.start, heads.start
        axes.add_patch(
            Rectangle(corner, width, height, facecolor=COLORS[process], edgecolor="white")
        )
        middle = tokens.start + width / 2, heads.start + height / 2
        axes.text(*middle, str(process), color="white", ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, TOKENS), ylim=(HEADS, 0))
    axes.set_xticks([0, TOKENS], ["0", "S"])
    axes.set_yticks([0, HEADS], ["0", "heads"])
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    figure().savefig(PICTURE, dpi=130)
