"""The project's dashboard in Weights & Biases: python launch/wandb_dashboard.py ENTITY [PROJECT]

Makes a saved view of the project with the groups of panels that a run's metrics have, as
docs/watching.md lists them. Needs a W&B account that is logged in (wandb login), and
pip install 'mst-train[dashboard]'. Each call makes a new view, and prints its address.
"""

import importlib.util
import sys
from typing import Any

from mst_train.config import TASKS
from mst_train.memory.tracker import KINDS
from mst_train.tracking.names import SCORES

NAME = "mst_train"

SECTIONS = {
    "Loss": ("train/loss", "val/loss", "train/learning_rate", "train/grad_norm"),
    "Use of the context": tuple(f"{task}/{score}" for task in TASKS for score in SCORES),
    "Speed": (
        "speed/tokens_per_second",
        "speed/model_flops_utilization",
        "speed/step_seconds",
        "speed/communication_share",
        "train/tokens",
    ),
    "Memory": ("memory/peak_gib", "memory/peak_process"),
}
"""The metrics of each section, a panel each."""

SMOOTHED = ("train/loss", "train/grad_norm", "speed/tokens_per_second", "speed/step_seconds")

PREDICTED = tuple(f"memory/predicted/{kind}" for kind in (*KINDS, "overhead"))


def main(arguments: list[str] | None = None) -> int:
    """Make the view; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    if importlib.util.find_spec("wandb_workspaces") is None:
        message = "wandb-workspaces is not installed: pip install 'mst-train[dashboard]'"
        print(f"error: {message}", file=sys.stderr)
        return 1
    view = workspace(*arguments)
    view.save()
    print(f"The view: {view.url}")
    return 0


def workspace(entity: str, project: str = "mst_train") -> Any:
    """The view, not yet saved."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    sections = {title: [_line(metric) for metric in names] for title, names in SECTIONS.items()}
    sections["Use of the context"].append(
        panels.LinePlot(
            title="validation loss by position", x="step", metric_regex="val_loss/position_.*"
        )
    )
    sections["Memory"].append(
        panels.BarPlot(title="predicted, GiB by kind", metrics=list(PREDICTED))
    )
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            workspaces.Section(name=title, panels=found, is_open=True)
            for title, found in sections.items()
        ],
    )


def _line(metric: str) -> Any:
    import wandb_workspaces.reports.v2 as panels

    smoothing = {"smoothing_factor": 0.9, "smoothing_type": "exponentialTimeWeighted"}
    return panels.LinePlot(
        title=metric,
        x="step",
        y=[metric],
        **(smoothing | {"smoothing_show_original": True} if metric in SMOOTHED else {}),
    )


if __name__ == "__main__":
    sys.exit(main())
