"""The files of a bench: results.json, results.md and results.png."""

import json
from pathlib import Path
from typing import Any

from mst_train.bench.report import markdown


def write(report: dict[str, Any], folder: Path) -> list[str]:
    """Write results.json, results.md and results.png; returns lines to show the user."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    (folder / "results.md").write_text(markdown(report))
    lines = [f"Results: {path}, {folder / 'results.md'}"]
    try:
        from mst_train.bench.plot import draw

        draw(report, folder / "results.png")
    except ImportError:
        return [
            *lines,
            f"No plot: matplotlib is not installed here. Where it is: "
            f"python -m mst_train.bench.plot {path}",
        ]
    return [f"{lines[0]}, {folder / 'results.png'}"]
