"""An evaluation as tables for a terminal."""

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table


def render(result: dict[str, Any]) -> str:
    """Text: which checkpoint and data, the losses by position, the tasks by length and depth."""
    console = Console(width=100, force_terminal=False, color_system=None)
    parts: list[RenderableType] = []
    if result["val_loss"] is not None:
        parts += ["", _positions(result)]
    sets = {
        key.removeprefix("val_loss_"): value
        for key, value in result.items()
        if key.startswith("val_loss_") and key != "val_loss_by_position"
    }
    if sets:
        parts += ["", _sets(sets)]
    for task in result["tasks"]:
        if result[task] is not None:
            parts += ["", _task(task, result)]
    with console.capture() as shown:
        console.print(Group(*parts))
    head = result["checkpoint"]
    if result["step"] is not None:
        head += f", after {result['step']:,} steps"
    data = f"on {', '.join(result['data'])}, in sequences of {result['sequence_length']:,} tokens"
    return "\n".join([head, data, *(line.rstrip() for line in shown.get().splitlines())])


def _positions(result: dict[str, Any]) -> Table:
    table = _table("from position", "validation loss", "tokens")
    for start, loss in result["val_loss_by_position"].items():
        table.add_row(f"{int(start):,}", f"{loss:.4f}", f"{result['val_tokens'][start]:,}")
    tokens = sum(result["val_tokens"].values())
    table.add_row("all", f"{result['val_loss']:.4f}", f"{tokens:,}")
    return table


def _sets(losses: dict[str, float]) -> Table:
    table = _table("of", "validation loss")
    for name, loss in losses.items():
        table.add_row(name, f"{loss:.4f}")
    return table


def _task(task: str, result: dict[str, Any]) -> Table:
    table = _table(f"{task} in tokens", "at depth", "answers right", "tokens right", "loss")

    def row(name: str, depth: str, found: dict[str, float], prefix: str = "") -> None:
        exact, accuracy = (f"{found[prefix + key]:.0%}" for key in ("exact", "accuracy"))
        table.add_row(name, depth, exact, accuracy, f"{found[f'{prefix}loss']:.4f}")

    for place in result[task]:
        row(f"{place['length']:,}", f"{place['depth']:.0%}" if "depth" in place else "", place)
    row("all", "", result, f"{task}_")
    exact, accuracy = (_odds(result[f"{task}_{key}"]) for key in ("exact_chance", "chance"))
    table.add_row("by chance", "", exact, accuracy, "")
    return table


def _odds(share: float) -> str:
    """In percent, and 0% for nothing alone."""
    return f"{share:.0%}" if share == 0 or share >= 0.005 else "<1%"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    for column in columns:
        table.add_column(column, justify="right")
    return table
