"""The parts of the page, each a piece of HTML."""

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

import yaml

from mst_train.memory.tracker import KINDS
from mst_train.plan.predict import LABELS
from mst_train.plan.show import short_length
from mst_train.report.charts import (
    INK,
    LINES,
    Curve,
    line_chart,
    memory_chart,
)
from mst_train.report.read import Record, Run, curve, expert_use, group
from mst_train.report.tokenizers import warning
from mst_train.units import GIB, duration

Report = dict[str, Any]

FIGURES: tuple[tuple[str, Callable[[Run], str | None]], ...] = (
    ("training loss", lambda run: _or_none(run.last("loss"), "{:.4f}")),
    ("validation loss", lambda run: _or_none(run.last("val_loss"), "{:.4f}")),
    ("steps", lambda run: f"{run.training[-1]['step']:,}"),
    ("tokens", lambda run: _or_none(run.last("tokens"), "{:,.0f}")),
    ("tokens per second", lambda run: _or_none(run.median("tokens_per_second"), "{:,.0f}")),
    ("of the device's FLOP/s", lambda run: _or_none(run.median(MFU), "{:.1%}")),
    ("peak memory", lambda run: _size(run.last("peak_memory_bytes"))),
    ("time in steps", lambda run: duration(run.seconds)),
    ("passkey digits right", lambda run: _or_none(run.passkey_accuracy, "{:.0%}")),
)
MFU = "model_flops_utilization"

FROM_ZERO = ("Tokens per second", "Peak memory", "Use of experts")

OF_OTHER_COMMANDS = ("run", "plan", "bench", "prepare", "report")
"""Groups of settings that are no part of a training run, and its name."""


def heading(run: Run) -> str:
    """The run's name and, in a line, what it is."""
    model = group(run.settings, "model")
    parts = []
    if model:
        parts.append(f"{model['num_layers']} layers of {model['hidden_size']:,}")
        if model.get("num_experts"):
            parts.append(f"{model['num_experts']} experts")
    if run.sequence_length:
        parts.append(f"sequences of {run.sequence_length:,} tokens")
    parts += [str(run.settings[key]) for key in ("precision",) if key in run.settings]
    if run.prediction:
        parts.append(f"memory.policy={run.prediction['policy']}")
    hardware = group(run.environment, "hardware")
    parts += [str(hardware[key]) for key in ("gpu", "cpu") if key in hardware][:1]
    parts += [run.environment["date"][:10]] if "date" in run.environment else []
    return f"<h1>{escape(run.name)}</h1>\n<p class=faint>{escape(' · '.join(parts))}</p>"


def figures(runs: Sequence[Run]) -> str:
    """The key figures: cards for one run, a table for several."""
    rows = [(name, [value(run) for run in runs]) for name, value in FIGURES]
    rows = [(name, values) for name, values in rows if any(values)]
    if len(runs) == 1:
        cards = (
            f"<div class=card><b>{escape(str(values[0]))}</b><span>{name}</span></div>"
            for name, values in rows
        )
        return f"<section class=cards>{''.join(cards)}</section>"
    return f"<section class=scroll>{_table(runs, rows)}</section>"


def caution(runs: Sequence[Run]) -> str:
    """What to know before comparing the runs; nothing where there is nothing."""
    text = warning(runs)
    return f"<p class=caution>{escape(text)}</p>" if text else ""


def charts(runs: Sequence[Run], predictions: Sequence[Report]) -> str:
    """Curves over the steps, or over tokens where several runs are compared, and the memory.

    predictions: as ``memory.over_lengths`` gives them for the first run.
    """
    several = len(runs) > 1
    x_label = "tokens" if several else "step"

    def drawn(
        key: str, scale: float = 1, *, kind: str = "training", style: str = "line"
    ) -> list[Curve]:
        found = []
        for number, run in enumerate(runs):
            steps, values = curve(getattr(run, kind), key, scale)
            if values:
                x = _tokens_at(run, steps) if several else steps
                name = run.name if several else ""
                found.append(Curve(x, values, color(number), style, name))
        return found

    validation = drawn("val_loss", kind="validation", style="points")
    loss = drawn("loss", style="medians")
    around, rings = "bold: the median around a step", ""
    if len(runs) == 1 and validation:
        rings = "; rings: validation"
        loss += [Curve(line.x, line.y, INK, "rings", "validation") for line in validation]
    wanted = [
        ("Training loss", _of_losses(around + rings, runs), loss),
        ("Validation loss", _of_losses("over the same sequences each time", runs), validation),
        ("Learning rate", "", drawn("learning_rate")),
        ("Gradient norm", f"before clipping; {around}", drawn("grad_norm", style="medians")),
        ("Tokens per second", around, drawn("tokens_per_second", style="medians")),
        ("Peak memory", "GiB, the highest so far", drawn("peak_memory_bytes", GIB)),
        ("Use of experts", *_use_of_experts(runs)),
    ]
    parts = [
        _figure(title, note, line_chart(title, curves, x_label, from_zero=title in FROM_ZERO), runs)
        for title, note, curves in wanted
        if curves
    ]
    parts[2:2] = positions(runs)
    hint = "<p class='faint hint' hidden>Drag over a chart to see a part of it, in all charts; "
    hint += "double-click to see the whole.</p>"
    return f"{hint}<section class=charts>{''.join([*parts, *memory(runs, predictions)])}</section>"


def positions(runs: Sequence[Run]) -> list[str]:
    """The last validation loss by position; nothing where no run has more than one bucket."""
    last = [run.validation[-1] if run.validation else {} for run in runs]
    found = [(n, record.get("val_loss_by_position") or {}) for n, record in enumerate(last)]
    starts = sorted({int(start) for _, losses in found for start in losses})
    if len(starts) < 2:
        return []
    curves = []
    for number, losses in found:
        places = [place for place, start in enumerate(starts) if str(start) in losses]
        values = [losses[str(starts[place])] for place in places]
        name = runs[number].name if len(runs) > 1 else ""
        curves.append(Curve(places, values, color(number), "points", name))
    title, ticks = "Loss by position in the sequence", [short_length(start) for start in starts]
    chart = line_chart(title, curves, "tokens before, from", ticks=ticks)
    note = "the last validation; lower on the right: the context is used"
    return [_figure(title, _of_losses(note, runs), chart, runs)]


def _use_of_experts(runs: Sequence[Run]) -> tuple[str, list[Curve]]:
    """A note, and curves of the most used expert; with one run also of the least used one."""
    curves, several = [], len(runs) > 1
    for number, run in enumerate(runs):
        steps, most, least = expert_use(run.training)
        x = _tokens_at(run, steps) if several else steps
        if steps:
            name = run.name if several else "most used"
            curves.append(Curve(x, most, color(number), name=name))
        if steps and not several:
            curves.append(Curve(x, least, INK, name="least used"))
    which = "the most used one's share" if several else "the most and the least used one's share"
    return f"{which}; 1: all are used alike", curves


def _of_losses(note: str, runs: Sequence[Run]) -> str:
    return f"{note}; before comparing: the note on tokenizers above" if warning(runs) else note


def memory(runs: Sequence[Run], predictions: Sequence[Report]) -> list[str]:
    """Predicted memory by kind, at the run's length and over lengths, and what was measured."""
    measured = []
    for number, run in enumerate(runs):
        peak = run.last("peak_memory_bytes")
        if run.sequence_length and peak is not None:
            measured.append((run.sequence_length, peak / GIB, color(number)))
    if not predictions and len(measured) < 2:
        return []
    title, notes = "Memory against length", []
    if len(predictions) > 1:
        notes.append(f"areas: predicted for {runs[0].name}, by kind")
        if measured and runs[0].prediction["device"] == "cpu":
            notes.append("not the measured peak, which has all of Python and torch in it on a CPU")
            measured = []
    if measured:
        notes.append("dots: measured peaks")
    chart = memory_chart(title, predictions, measured)
    parts = [_figure(title, "; ".join(notes), chart, runs if measured else ())]
    if runs[0].prediction:
        parts.append(_breakdown(runs[0].prediction))
    return parts


def tasks(run: Run) -> str:
    """The last answers to each task, by length and depth; nothing where there were none."""
    return "\n".join(_task(task, records[-1]) for task, records in run.tasks.items())


def _task(task: str, last: Record) -> str:
    found = {(probe["length"], probe.get("depth")): probe["accuracy"] for probe in last[task]}
    lengths = sorted({length for length, _ in found})
    depths = sorted({depth for _, depth in found}, key=lambda depth: depth or 0)
    head = "".join(f"<th>{'' if depth is None else f'{depth:.0%}'}</th>" for depth in depths)
    rows = "".join(
        f"<tr><th>{length:,} tokens</th>"
        + "".join(_share(found.get((length, depth))) for depth in depths)
        + "</tr>"
        for length in lengths
    )
    note = f"After {last['step']:,} steps: "
    if task == "passkey":
        title = "Passkey retrieval"
        note += "how much of a hidden number the model finds, by the text's length"
    else:
        title = task
        note += "how many of the answers' tokens the model finds, by the text's length"
    note += "" if depths == [None] else " and the number's place in it"
    chance = last.get(f"{task}_chance")
    note += "" if chance is None else f"; {chance:.0%} by chance"
    table = f"<div class=scroll><table><tr><th></th>{head}</tr>{rows}</table></div>"
    return f"<section>{_figure(title, note, table)}</section>"


def details(runs: Sequence[Run]) -> str:
    """Settings that differ, and each run's whole configuration and environment, folded."""
    parts = [_differences(runs)] if len(runs) > 1 else []
    for run in runs:
        of = f" of {run.name}" if len(runs) > 1 else ""
        contents = ("Configuration", _read_ones(run.settings)), ("Environment", run.environment)
        for title, content in contents:
            if content:
                text = escape(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
                parts.append(
                    f"<details><summary>{escape(title + of)}</summary><pre>{text}</pre></details>"
                )
    return f"<section>{''.join(parts)}</section>"


def color(number: int) -> str:
    """The colour of the ``number``-th run's lines."""
    return LINES[number % len(LINES)]


def swatch(number: int) -> str:
    """A dot in that colour."""
    return f'<i class=dot style="background:var(--line-{number % len(LINES)})"></i>'


def _figure(title: str, note: str, content: str, runs: Sequence[Run] = ()) -> str:
    """runs: those that the content compares, where there are several."""
    caption = f"<p class=faint>{escape(note)}</p>" if note else ""
    key = f"<p class=key>{''.join(_named(runs))}</p>" if len(runs) > 1 else ""
    return f"<figure><h2>{escape(title)}</h2>{caption}{key}{content}</figure>"


def _named(runs: Sequence[Run]) -> list[str]:
    return [
        f"<span class=run>{swatch(number)}{escape(run.name)}</span>"
        for number, run in enumerate(runs)
    ]


def _table(runs: Sequence[Run], rows: Iterable[tuple[str, Sequence[str | None]]]) -> str:
    """A column for each run; rows: names and values."""
    head = "".join(f"<th>{name}</th>" for name in _named(runs))
    body = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f"<td>{escape(value or '')}</td>" for value in values)
        + "</tr>"
        for name, values in rows
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _breakdown(prediction: dict[str, Any]) -> str:
    parts = [(kind, prediction["breakdown"].get(kind, 0)) for kind in (*KINDS, "overhead")]
    largest = max(size for _, size in parts) or 1
    rows = "".join(
        f'<tr><td>{LABELS[kind]}</td><td class=number>{_size(size)}</td><td class=bar><i style="'
        f'width:{100 * size / largest:.1f}%;background:var(--area-{kind})"></i></td></tr>'
        for kind, size in parts
        if size
    )
    total = f"<tr><td>at the peak</td><td class=number>{_size(prediction['peak_bytes'])}</td>"
    budget = f"<td class=faint>of {_size(prediction['budget_bytes'])}</td></tr>"
    note = f"{prediction['sequence_length']:,} tokens on {prediction['device']}"
    table = f"<table class=parts>{rows}{total}{budget}</table>"
    return _figure("Predicted memory by kind", note, table)


def _differences(runs: Sequence[Run]) -> str:
    flat = [dict(_leaves(_read_ones(run.settings))) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = []
    for key in keys:
        values = [settings.get(key, []) for settings in flat]
        ours = key.partition(".")[0] not in OF_OTHER_COMMANDS
        if ours and any(value != values[0] for value in values):
            rows.append((key, [_written(value) for value in values]))
    if not rows:
        return ""
    return f"<h2>Settings that differ</h2><div class=scroll>{_table(runs, rows)}</div>"


def _read_ones(settings: Report) -> Report:
    """The settings without ``data.source`` where the sources of a mixture were read instead."""
    data = group(settings, "data")
    if not data.get("mixture"):
        return settings
    return settings | {"data": {key: data[key] for key in data if key != "source"}}


def _written(value: Any) -> str:
    """A setting's value in a line, as it is typed; nothing for an empty list."""
    if isinstance(value, list):
        return ", ".join(_written(part) for part in value)
    if isinstance(value, dict):
        return " ".join(f"{key}={_written(part)}" for key, part in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _share(share: float | None) -> str:
    if share is None:
        return "<td></td>"
    return f'<td><span class=share style="--share:{share:.2f}">{share:.0%}</span></td>'


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _tokens_at(run: Run, steps: Sequence[int]) -> list[float]:
    """The tokens trained on after each of ``steps``."""
    known = dict(zip(*curve(run.training, "tokens"), strict=True))
    return [known.get(step, 0.0) for step in steps]


def _or_none(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def _size(size: float | None) -> str | None:
    if size is None:
        return None
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
