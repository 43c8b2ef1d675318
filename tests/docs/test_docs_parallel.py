"""The picture of who holds what."""

import runpy
from pathlib import Path

from matplotlib.patches import Rectangle

SCRIPT = Path(__file__).parents[2] / "docs/parallel.py"


def test_every_token_and_head_has_one_process():
    """Outside attention and in it; the written picture is there."""
    script = runpy.run_path(str(SCRIPT))
    panels = script["figure"]().axes
    whole = script["TOKENS"] * script["HEADS"]
    areas = [sum(p.get_width() * p.get_height() for p in axes.patches) for axes in panels]
    assert all(isinstance(patch, Rectangle) for axes in panels for patch in axes.patches)
    assert areas[:6] == [whole] * 6
    assert all(
        0 < window <= keys <= whole for keys, window in zip(areas[6:9], areas[9:], strict=True)
    )
    assert SCRIPT.with_suffix(".png").exists()
