"""An evaluation as tables for a terminal."""

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table


def render(result: dict[str, Any]) -> str:
    """Text: which checkpoint and data, the losses by position, the passkeys by length and depth."""
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
    if result["passkey"] is not None:
        parts += ["", _passkeys(result)]
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


def _passkeys(result: dict[str, Any]) -> Table:
    table = _table("passkey in tokens", "at depth", "digits right", "loss")
    for probe in result["passkey"]:
        accuracy = f"{probe['accuracy']:.0%}"
        table.add_row(
            f"{probe['length']:,}", f"{probe['depth']:.0%}", accuracy, f"{probe['loss']:.4f}"
        )
    table.add_row("all", "", f"{result['passkey_accuracy']:.0%}", f"{result['passkey_loss']:.4f}")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    for column in columns:
        table.add_column(column, justify="right")
    return table
