"""Predictions for people: a table in the terminal, Markdown for files."""

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from mst_train.memory.tracker import KINDS
from mst_train.plan.choose import describe
from mst_train.plan.predict import LABELS, Prediction
from mst_train.plan.speed import exchange_seconds
from mst_train.units import GIB, duration

COLUMNS = ("tokens", "peak", "", "host", "step", "tokens/s", "settings")
_BAR = 28


def render(predictions: Sequence[Prediction], notes: Sequence[str], width: int) -> str:
    """Text for a terminal: one prediction in full, or a table of several."""
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=False, color_system=None)
    body = _one(predictions[0]) if len(predictions) == 1 else _several(predictions)
    console.print(body)
    return "\n".join([*(line.rstrip() for line in text.getvalue().splitlines()), *notes])


def _one(prediction: Prediction) -> Group:
    found, target = prediction.simulation, prediction.target
    verdict = "fits" if prediction.fits else "does not fit"
    gpus = f"{target.gpus} x {target.device.name}" if target.gpus > 1 else target.device.name
    head = Text(
        f"{prediction.config.run.name}: {prediction.config.data.sequence_length:,} tokens on "
        f"{gpus}, {describe(prediction)}: {verdict}"
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    parts = prediction.report()["breakdown"]
    for kind in (*KINDS, "overhead"):
        share = parts[kind] / max(target.budget_bytes, 1)
        bar = "█" * min(round(share * _BAR), _BAR)
        table.add_row(LABELS[kind], gib(parts[kind]), bar)
    budget = f"of {gib(target.budget_bytes)}" + (" on each" if target.gpus > 1 else "")
    table.add_row("at the peak", gib(found.peak_bytes), budget)
    if found.reserved_bytes is not None:
        table.add_row("reserved by torch", gib(found.reserved_bytes), "of that")
    if found.host_bytes:
        host = target.host_budget_bytes
        of = "" if host is None else f"of {gib(host)}"
        table.add_row("in the host's memory", gib(found.host_bytes), of)
    policy = found.policy
    chunks = f"head {policy.head_chunk_tokens:,} tokens"
    if prediction.config.memory.policy == "mst":
        chunks = f"block {policy.block_chunk_tokens:,}, MLP {policy.mlp_chunk_tokens:,}, {chunks}"
        table.add_row("chunks", "", chunks)
    _add_exchange(table, prediction)
    flops = Text(f"{found.work.flops:.3g} FLOP a step on each device")
    return Group(head, "", table, "", flops, Text(_time(prediction)))


def _add_exchange(table: Table, prediction: Prediction) -> None:
    """What a process that shares its sequences sends to others, or gets from them."""
    if prediction.config.parallel.sequence_parallel == 1:
        return
    exchange, work = prediction.simulation.exchange, prediction.simulation.work
    exchanging, awaited = exchange_seconds(work, prediction.target.device)
    name = {"both": "heads and keys"}.get(exchange.name, exchange.name)
    time = f", {duration(exchanging)}, {duration(awaited)} of it waited for" if exchanging else ""
    for words, size in (("in a machine", work.peer_bytes), ("between them", work.network_bytes)):
        if size:
            table.add_row(name and f"{name} exchanged", gib(size), words + time)
            name = time = ""


def _time(prediction: Prediction) -> str:
    rates = prediction.target.rates
    if prediction.seconds is None or rates is None:
        return "no prediction of time: the device's rates are not known"
    speed = prediction.tokens_per_step / prediction.seconds
    return f"{duration(prediction.seconds)} a step, {speed:,.0f} tokens/s ({rates.source})"


def _several(predictions: Sequence[Prediction]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("", "settings") else "right")
    for row in rows(predictions):
        table.add_row(*row)
    return table


def rows(predictions: Sequence[Prediction]) -> list[list[str]]:
    """The ``COLUMNS`` of each."""
    return [
        [
            f"{p.config.data.sequence_length:,}",
            gib(p.simulation.peak_bytes),
            "fits" if p.fits else "too large",
            gib(p.simulation.host_bytes) if p.simulation.host_bytes else "",
            "" if p.seconds is None else duration(p.seconds),
            "" if p.seconds is None else f"{p.tokens_per_step / p.seconds:,.0f}",
            describe(p),
        ]
        for p in predictions
    ]


def markdown(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    parts = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in parts) + "\n"


def gib(size: float) -> str:
    """A size for people."""
    return f"{size / GIB:.2f} GiB"


def short_length(tokens: int) -> str:
    """A length in tokens: 4096 as 4K, where it is a whole multiple of 1024."""
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"
