"""README.md: what has been made so far, with where it is from."""

import json
from pathlib import Path
from typing import Any

from mst_train.paper import sections, sections_measured
from mst_train.paper.sections import prose
from mst_train.units import duration

Report = dict[str, Any]

SECTIONS = {
    "longest": ("The longest sequence on one 80 GB GPU", sections.longest),
    "several": ("Several GPUs", sections.several),
    "lengths": ("What fills the memory, over the length", sections.lengths),
    "ablations": ("The number of chunks", sections.ablations),
    "reach": ("How far back a text has what tells its next token", sections_measured.reach),
    "convergence": ("Training on long sequences", sections_measured.convergence),
}

INTRODUCTION = """
    What the [Mini-Sequence Transformer](https://arxiv.org/abs/2407.15892) (NeurIPS 2024) reports,
    beside what this project predicts and measures. `make paper` makes this page.
"""
KINDS = """
- **reported**: by the paper. Its abstract has the numbers without a mark; those with † are recalled
  from its tables and not confirmed.
- **predicted**: by `mst_train.plan`. A training step runs on tensors that have only shapes, its
  bytes and operations are counted, and what such tensors do not show is assumed, as stated below.
- **measured**: on the machine that is named.

On a GPU everything is **not yet measured**: each number about one is predicted. K is 1,024 tokens.
"""


def write(folder: Path) -> Path:
    """Write the page of the pieces in a folder; returns its path."""
    parts = ["# The paper's experiments", prose(INTRODUCTION), KINDS.strip()]
    for name, (title, section) in SECTIONS.items():
        parts.append(f"## {title}")
        path = folder / f"{name}.json"
        if path.exists():
            report = json.loads(path.read_text())
            parts += [*section(report), _origin(report, path.name)]
        else:
            parts.append(f"Not made yet: `python -m mst_train.paper --only {name}` makes it.")
    page = folder / "README.md"
    page.write_text("\n\n".join(part.strip() for part in parts) + "\n")
    return page


def _origin(report: Report, file: str) -> str:
    """Where a piece's numbers are from."""
    versions = report["versions"]
    named = [f"{p} {versions[p]}" for p in ("python", "torch", "transformers") if p in versions]
    return prose(
        "[{file}]({file}): `{command}`, {date}, commit {commit}, {versions}; {seconds} on {cpu}.",
        file=file,
        command=report["command"],
        date=report["date"][:10],
        commit=report["git_commit"] or "unknown",
        versions=", ".join(named),
        seconds=duration(report["seconds"]),
        cpu=report["hardware"]["cpu"],
    )
