"""The page of a run: what is on it, that it loads nothing, and what it is made from."""

import base64
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from mst_train.cli.compose import compose
from mst_train.config import KeepConfig
from mst_train.errors import UserError
from mst_train.memory.devices import find_device
from mst_train.memory.tracker import KINDS
from mst_train.model import Policy
from mst_train.plan.candidates import settings
from mst_train.plan.predict import make_target, predict
from mst_train.report import charts
from mst_train.report.__main__ import main
from mst_train.report.memory import _as_planned, over_lengths
from mst_train.report.page import COLORS, POLICY, page
from mst_train.report.read import read_run, read_runs
from mst_train.run.train import train

GIB = 2**30


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder for what is made once."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def run(small_config, change, made):
    """A finished run with validations at two positions, and its page."""
    folder = made / "run"
    if not folder.exists():
        settings = {"data.sequence_length": 400, "run.name": "<b>first</b>", "train.steps": 4}
        train(change(small_config, **settings, **{"run.dir": str(folder)}))
        assert main([f"run.dir={folder}"]) == 0
    return folder


def make_run(folder, steps=30, **settings):
    """The records of a run, without one."""
    folder.mkdir()
    lines = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "loss": 5 - 0.1 * step,
                "learning_rate": 1e-3,
                "grad_norm": 1.0,
                "tokens": 1000 * step,
                "tokens_per_second": 500.0 + step,
                "step_seconds": 2.0,
                "model_flops_utilization": 0.41,
                "peak_memory_bytes": 3 * GIB,
            }
        )
    lines.append({"step": steps, "val_loss": 2.25, "val_loss_by_position": {"0": 2.5, "256": 2.0}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if settings:
        (folder / "config.yaml").write_text(json.dumps(settings))
    return folder


def written(folder):
    return (folder / "report.html").read_text()


@pytest.fixture
def quick(monkeypatch):
    """The page without its drawings, which take most of its time; their data are still read."""
    from mst_train.report import sections

    def draw(name, curves, label, **settings):
        values = [value for curve in curves for value in (*curve.x, *curve.y)]
        assert all(abs(float(value)) < 1e101 for value in values)
        return f"<svg {charts.medians(values)[:1]}></svg>"

    def draw_memory(name, reports, measured):
        kinds = charts.AREAS
        assert all(report["breakdown"][kind] >= 0 for report in reports for kind in kinds)
        return "<svg></svg>"

    monkeypatch.setattr(sections, "line_chart", draw)
    monkeypatch.setattr(sections, "memory_chart", draw_memory)


class Page(HTMLParser):
    """Checks that tags close in order, and collects attributes and texts."""

    VOID = ("meta", "br", "i/")

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_a_runs_page(run):
    text = written(run)
    page = Page(text)
    summary = json.loads((run / "summary.json").read_text())
    assert "<b>first</b>" in page.texts
    assert "<b>first" not in text
    for shown in (
        f"{summary['loss']:.4f}",
        f"{summary['val_loss']:.4f}",
        "1,600",
        "Training loss",
        "Validation loss",
        "Loss by position in the sequence",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
        "Peak memory",
        "Memory against length",
        "Predicted memory by kind",
        "LM head and loss",
        "Configuration",
        "Environment",
    ):
        assert shown in page.texts, shown
    assert text.count("<svg ") == 8
    assert "sequence_length: 400" in text
    assert "git_commit" in text
    lengths = {tick for tick in page.texts if tick in ("100", "200", "400", "800")}
    assert lengths == {"100", "200", "400", "800"}


def test_the_page_loads_nothing(run):
    """No address but XML's names, and references only into the page itself."""
    text = written(run)
    page = Page(text)
    loading = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}
    for tag, name, value in page.attributes:
        if name in loading:
            assert value.startswith("#"), (tag, name, value)
        if name.startswith("xmlns") or (tag == "meta" and value == POLICY):
            continue
        assert not re.search(r"https?:|//", value or ""), (tag, name, value)
    tags = {tag for tag, _, _ in page.attributes} | set(re.findall(r"<(\w+)", text))
    assert not tags & {"link", "img", "iframe", "object", "embed", "image", "base"}
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|http-equiv', "", text)
    assert "@import" not in text
    assert "@font-face" not in text
    assert all(inside.startswith("#") for inside in re.findall(r"url\(([^)]*)\)", text))


def test_the_one_script_is_ours_and_a_browser_lets_it_ask_for_nothing(run):
    text = written(run)
    (script,) = re.findall(r"<script([^>]*)>(.*?)</script>", text, re.DOTALL)
    assert script == ("", charts.SCRIPT)
    assert not re.search(r"fetch|XMLHttp|import|eval|Function\(|innerHTML|new (?!Set)", script[1])
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert text.index(policy) < text.index("<style")


def held(text):
    """What the script reads of each chart, by the chart's name."""
    found = re.findall(r'<svg role="img" aria-label="([^"]*)" data-chart="([^"]*)"', text)
    return {name: json.loads(unescape(chart)) for name, chart in found}


def test_the_page_holds_the_values_that_were_measured(run):
    records = read_run(run)
    found = held(written(run))
    keys = {"Training loss": "loss", "Learning rate": "learning_rate", "Gradient norm": "grad_norm"}
    keys |= {"Tokens per second": "tokens_per_second", "Validation loss": "val_loss"}
    for name, key in keys.items():
        curve = found[name]["curves"][0]
        measured = records.validation if key == "val_loss" else records.training
        assert curve["x"] == [record["step"] for record in measured]
        assert curve["y"] == pytest.approx([record[key] for record in measured], rel=1e-5)
        if name in ("Training loss", "Gradient norm", "Tokens per second"):
            assert curve["medians"] == pytest.approx(charts.medians(curve["y"]), rel=1e-5)
    assert found["Training loss"]["curves"][1]["y"] == found["Validation loss"]["curves"][0]["y"]
    peak = records.last("peak_memory_bytes") / GIB
    assert found["Peak memory"]["curves"][0]["y"][-1] == pytest.approx(peak, rel=1e-5)
    assert found["Loss by position in the sequence"]["ticks"] == ["0", "256"]


def test_compared_runs_are_held_over_tokens_with_their_names(tmp_path):
    first = make_run(tmp_path / "a", run={"name": 'a "<run>"'})
    assert main([f"run.dir={first}", f"report.compare=[{make_run(tmp_path / 'b', 20)}]"]) == 0
    loss = held(written(first))["Training loss"]
    assert loss["label"] == "tokens"
    assert [curve["name"] for curve in loss["curves"]] == ['a "<run>"', "b"]
    assert [curve["x"][-1] for curve in loss["curves"]] == [30_000, 20_000]


def test_the_use_of_experts_is_drawn(tmp_path):
    """As a run with experts records it; runs without any stand beside it."""
    first, second = make_run(tmp_path / "a", 2), make_run(tmp_path / "b", 2)
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    lines[0]["expert_load"], lines[1]["expert_load"] = [0.25, 0.5, 0.25, 0.0], [0.25] * 4
    (first / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([f"run.dir={first}"]) == 0
    most, least = held(written(first))["Use of experts"]["curves"]
    assert (most["name"], most["x"], most["y"]) == ("most used", [1, 2], [2, 1])
    assert (least["name"], least["x"], least["y"]) == ("least used", [1, 2], [0, 1])
    assert main([f"run.dir={first}", f"report.compare=[{second}]"]) == 0
    (curve,) = held(written(first))["Use of experts"]["curves"]
    assert (curve["name"], curve["x"], curve["y"]) == ("a", [1000, 2000], [2, 1])
    assert main([f"run.dir={second}"]) == 0
    assert "Use of experts" not in held(written(second))


def test_the_script_finds_points_where_they_are_drawn():
    x, y = [1, 2, 4], [3.0, 9.0, 5.0]
    svg = charts.line_chart("x", [charts.Curve(x, y, charts.LINES[0])], "step")
    chart = held(svg)["x"]
    left, top, right, bottom = chart["box"]
    (line,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--line-0\)', svg)
    drawn = [float(number) for number in re.findall(r"[\d.]+", line)]
    for n in range(3):
        across = (x[n] - chart["x"][0]) / (chart["x"][1] - chart["x"][0])
        up = (y[n] - chart["y"][0]) / (chart["y"][1] - chart["y"][0])
        place = left + across * (right - left), bottom - up * (bottom - top)
        assert drawn[2 * n : 2 * n + 2] == pytest.approx(place, abs=0.01)


def test_a_long_run_is_held_with_its_spikes():
    y = [1.0] * 100_000
    y[50_000] = 9.0
    curve = charts.Curve(range(100_000), y, charts.LINES[0], "medians")
    (found,) = held(charts.line_chart("x", [curve], "step"))["x"]["curves"]
    assert len(found["x"]) == len(found["y"]) == len(found["medians"]) <= charts.HELD + 2
    assert found["y"][found["x"].index(50_000)] == 9.0
    assert set(found["medians"]) == {1.0}


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_the_scripts_numbers():
    values = [0, 0.0003, 950, 1500, -1500, 2.5e6, 7.448912, 0.30000000000000004]
    calls = {
        f"{values}.map(short)": [charts.short(value) for value in values],
        "ticks(0.2, 9.7, 5)": [2, 4, 6, 8],
        "ticks(3.2, 5.1, 7, 1)": [4, 5],
        "ticks(-1, 1, 4)": [-1, -0.5, 0, 0.5, 1],
        "logTicks(0.3, 40)": [0.5, 1, 2, 5, 10, 20],
        "logTicks(0.3, 40000)": [1, 10, 100, 1000, 10000],
        "logTicks(6.3, 8.4)": [6.5, 7, 7.5, 8],
        "around([1, 3], false, false)": [0.9, 3.1],
        "around([1, 3], false, true)": [0, 3.1],
        "around([2, 2], false, false)": [1.9, 2.1],
        "around([0, 1, Math.exp(2)], true, true).map(Math.log)": [-0.1, 2.1],
        "around([0, -1], true, false)": [1, 10],
        "[0, 1.4, 1.6, 3, 9].map((x) => nearest([1, 2, 4], x))": [0, 0, 1, 1, 2],
    }
    told = f"{charts.SCRIPT}\nconsole.log(JSON.stringify([{','.join(calls)}]))"
    done = subprocess.run(["node", "-"], input=told, capture_output=True, text=True, check=True)
    for (call, expected), found in zip(calls.items(), json.loads(done.stdout), strict=True):
        if not isinstance(expected[0], str):
            expected = pytest.approx(expected)
        assert found == expected, call


def test_light_and_dark_have_every_colour_that_is_used(run):
    text = written(run)
    used = set(re.findall(r"var\(--([\w-]+)\)", text)) - {"share"}
    assert used <= set(COLORS)
    assert {f"area-{kind}" for kind in (*KINDS, "overhead")} <= set(COLORS)
    assert {f"line-{number}" for number in range(len(charts.LINES))} <= set(COLORS)
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.search(r"(fill|stroke): #", drawings)
    assert "prefers-color-scheme:dark" in text
    ids = re.findall(r' id="([^"]+)"', "".join(re.findall(r"<clipPath[^>]*>", drawings)))
    assert len(ids) == len(set(ids))


def test_runs_are_compared(tmp_path, capsys):
    model = {"num_layers": 2, "hidden_size": 8}
    first = make_run(
        tmp_path / "a", run={"name": "long"}, model=model, data={"sequence_length": 2048}
    )
    second = make_run(
        tmp_path / "b", run={"name": "short"}, model=model, data={"sequence_length": 512}
    )
    third = make_run(tmp_path / "c")  # nothing but records
    assert main([f"run.dir={first}", f"report.compare=[{second},{third}]"]) == 0
    assert f"The page: {first}/report.html" in capsys.readouterr().out
    page = Page(written(first))
    for name in ("long", "short", "c"):
        assert page.texts.count(name) >= 8
    assert "Settings that differ" in page.texts
    assert "data.sequence_length" in page.texts
    assert "41.0%" in page.texts
    assert "3.00 GiB" in page.texts
    assert "Memory against length" in page.texts
    assert not (second / "report.html").exists()


OLD = {"tokenizer": None, "tokenizer_vocab_size": 4096, "source": "texts"}


@pytest.mark.parametrize(
    ("tokenizers", "data", "said"),
    [
        (("a", "b"), ({}, {}), "These runs have different tokenizers: their losses are per token"),
        (("a", "a"), (OLD, OLD | {"source": "others"}), ""),
        (("a", None), (OLD, OLD), ""),
        ((None, None), ({}, {}), ""),
        ((None, "a"), (OLD, OLD | {"source": "others"}), "as they differ in data.source: their"),
        (
            (None, None),
            (OLD, OLD | {"tokenizer_vocab_size": 512}),
            "as they differ in data.tokenizer_vocab_size: their losses",
        ),
        (
            (None, None),
            (OLD | {"tokenizer": "x"}, OLD | {"tokenizer": "x", "source": "others"}),
            "",
        ),
        (
            (None, None),
            (OLD | {"tokenizer": "x"}, OLD | {"tokenizer": "y"}),
            "as they differ in data.tokenizer: their losses",
        ),
        (
            (None, None),
            ({"mixture": [{"source": "texts"}]}, {"mixture": [{"source": "others"}]}),
            "as they differ in data.mixture: their losses",
        ),
    ],
)
def test_losses_of_other_tokenizers_are_warned_of(tmp_path, quick, caplog, tokenizers, data, said):
    runs = []
    for name, tokenizer, part in zip("ab", tokenizers, data, strict=True):
        runs.append(make_run(tmp_path / name, data=part and part | {"sequence_length": 512}))
        if tokenizer:
            (runs[-1] / "environment.json").write_text(json.dumps({"tokenizer": tokenizer}))
    assert main([f"run.dir={runs[0]}", f"report.compare=[{runs[1]}]"]) == 0
    text = unescape(written(runs[0]))
    assert said in caplog.text
    assert bool(said) == ("tokenizer" in caplog.text) == ("<p class=caution>" in text)
    assert f"<p class=caution>{caplog.messages[0] if said else ''}" in text or not said
    assert text.count("before comparing: the note on tokenizers above") == (3 if said else 0)


def test_a_run_says_which_tokenizer_it_has(run):
    from mst_train.checkpoint.files import find_checkpoint, load_part

    environment = json.loads((run / "environment.json").read_text())
    assert environment["tokenizer"] == load_part(find_checkpoint(run), "trainer")["tokenizer"]


def test_steps_that_were_left_out_and_broken_lines(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "skipped": "the loss is nan", "tokens": 31000}\n')
        file.write('{"step": 32, "loss": NaN, "grad_norm": Infinity, "tokens": 32000}\n')
        file.write('{"step": 32, "stopped": "SIGTERM"}\n')
        file.write('{"step": 33, "lo')
    run = read_run(folder)
    assert run.training[-1]["step"] == 32
    assert run.last("loss") == pytest.approx(2.0)
    assert run.last("tokens") == 32000
    assert main([f"run.dir={folder}"]) == 0
    assert not re.search(r"\bnan\b|\binf\b", written(folder).lower())


@pytest.mark.parametrize("others", [False, True])
def test_a_folder_without_a_run_is_refused(tmp_path, capsys, others):
    empty = tmp_path / "nothing"
    empty.mkdir()
    arguments = [f"run.dir={empty}"]
    if others:
        run = make_run(tmp_path / "run")
        arguments = [f"run.dir={run}", f"report.compare=[{empty}]"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: {empty} holds no metrics.jsonl: give the folder of a run (run.dir=DIR, "
        f"report.compare=[DIR,...])\n"
    )
    assert not list(tmp_path.glob("*/*report.html*"))


def test_a_checkpoint_of_a_run_is_told_the_runs_folder(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    checkpoint = run / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    assert main([f"run.dir={checkpoint}"]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {checkpoint} is a part of a run: give the run's folder, {run}\n"


def test_a_run_may_be_compared_with_itself(tmp_path):
    run = make_run(tmp_path / "run")
    assert main([f"run.dir={run}", f"report.compare=[{run}]"]) == 0
    assert (run / "report.html").exists()


def test_a_run_without_a_step_is_refused(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val_loss": 5.0}\n')
    assert main([f"run.dir={tmp_path}"]) == 2
    assert "holds no training step yet" in capsys.readouterr().err


def test_thin_keeps_what_sticks_out():
    y = [1.0] * 100_000
    y[50_000], y[70_000] = 9.0, -9.0
    x, kept = charts.thin(range(100_000), y)
    assert len(kept) <= charts.POINTS + 2
    assert (x[kept.index(9.0)], x[kept.index(-9.0)]) == (50_000, 70_000)
    assert x == sorted(x)
    assert charts.thin([1, 2, 3], [3.0, 2.0, 1.0]) == ([1, 2, 3], [3.0, 2.0, 1.0])


def test_a_spike_is_no_plateau_of_medians():
    assert charts.medians([1.0, 1.0, 1.0, 90.0, 1.0, 1.0, 1.0]) == 7 * [1.0]
    assert charts.medians([1.0, 1.0, 1.0, 4.0, 4.0, 4.0]) == [1.0, 1.0, 1.0, 4.0, 4.0, 4.0]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6, 150])
def test_medians_are_those_of_the_values_around(count):
    values = [step * 7919 % 151 / 4 for step in range(count)]
    half = max(count // 40, 2)
    around = [values[max(step - half, 0) : step + half + 1] for step in range(count)]
    assert charts.medians(values) == [median(part) for part in around]


def test_memory_on_a_cpu_is_drawn_without_the_process(run):
    """Areas of some MiB, which a process's peak would press flat."""
    text = written(run)
    drawing = re.search(r'<svg role="img" aria-label="Memory against length".*?</svg>', text, re.S)
    ticks = [float(tick) for tick in re.findall(r">([\d.]+) MiB<", drawing[0])]
    report = json.loads((run / "prediction.json").read_text())
    assert 3 <= len(ticks) <= 8
    assert max(ticks) < 4 * report["peak_bytes"] / 2**20
    assert "var(--line-0)" not in drawing[0]
    assert "not the measured peak" in text


def test_runs_of_one_name_are_called_after_their_folders(tmp_path):
    named = {"tiny": ["x/run", "y/run"], "other": ["z"]}
    folders = [tmp_path / folder for group in named.values() for folder in group]
    for name, group in named.items():
        for folder in group:
            (tmp_path / folder).parent.mkdir(exist_ok=True)
            make_run(tmp_path / folder, 1, run={"name": name})
    assert [run.name for run in read_runs(folders)] == ["x/run", "y/run", "other"]
    assert [run.name for run in read_runs(folders[1:])] == ["tiny", "other"]


def test_a_mixture_is_listed_with_the_sources_it_read(tmp_path):
    mixture = [{"source": "books/", "weight": 2.0}, {"source": "code/", "weight": 1.0}]
    data = {"source": "stdlib", "sequence_length": 64, "mixture": mixture}
    one = make_run(tmp_path / "one", data={**data, "mixture": []})
    mixed = make_run(tmp_path / "mixed", data=data)
    assert main([f"run.dir={mixed}", f"report.compare=[{one}]"]) == 0
    texts = Page(written(mixed)).texts
    assert "source=books/ weight=2.0, source=code/ weight=1.0" in texts
    assert texts[texts.index("data.source") + 1] == "stdlib"  # the other's, so they differ
    (settings,) = [text for text in texts if "source: code/" in text]
    assert "stdlib" not in settings


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0"), (0.0003, "0.0003"), (950.0, "950"), (1500.0, "1.5K"), (2.5e6, "2.5M")],
)
def test_short_numbers(value, expected):
    assert charts.short(value) == expected


# ---------------------------------------------------------------- damaged files


JUNK = [None, True, -1, 0, 10**400, 1e308, math.nan, "text", [], [[1]], {}, {"a": 1}, "\ud800"]
"""What a file could hold in the place of anything."""

PLACES = {
    "metrics.jsonl": [
        ["step"],
        ["loss"],
        ["tokens"],
        ["val_loss_by_position", "0"],
        ["passkey"],
        ["passkey", 0, "length"],
        ["passkey", 0, "depth"],
        ["vt"],
        ["vt", 0, "length"],
        ["expert_load"],
        ["expert_load", 0],
    ],
    "config.yaml": [["run"], ["run", "name"], ["model"], ["model", "num_layers"], ["data"]],
    "environment.json": [["date"], ["hardware"], ["tokenizer"]],
    "prediction.json": [["breakdown"], ["breakdown", "head"], ["peak_bytes"], ["device"], ["gpus"]],
}


def whole_run(folder):
    """A run's files, each with everything that the page reads."""
    make_run(folder, steps=3, run={"name": "a run"}, model={"num_layers": 2, "hidden_size": 8})
    probes = [{"length": 64, "depth": 0.5, "accuracy": 0.5, "loss": 1.0}]
    record = {"step": 3, "passkey_accuracy": 0.5, "passkey_loss": 1.0, "passkey": probes}
    everything = {
        **json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]),
        **{"vt": [{"length": 64, "accuracy": 0.5}], "vt_accuracy": 0.5, "expert_load": [0.5, 0.5]},
        **{"val_loss": 2.0, "val_loss_by_position": {"0": 2.5, "256": 2.0}, **record},
    }
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(everything) + "\n")
    environment = {"date": "2026-01-01", "hardware": {"cpu": "one"}, "tokenizer": "def"}
    (folder / "environment.json").write_text(json.dumps(environment))
    prediction = {
        "breakdown": dict.fromkeys((*KINDS, "overhead"), 10),
        **{"peak_bytes": 80, "budget_bytes": 100, "sequence_length": 64, "tokens_per_step": 64},
        **{"gpus": 1, "device": "cpu", "policy": "mst", "offload": "none"},
        **{"keep": {"attention": "all"}, "in_backward": False},
    }
    (folder / "prediction.json").write_text(json.dumps(prediction))
    return folder


def told(path, caplog):
    """Make the page of a run; whether a message names its damaged file."""
    caplog.clear()
    try:
        run = read_run(path.parent)
    except UserError as error:
        return str(path) in str(error)
    page([run], [run.prediction] if run.prediction else []).encode()
    return str(path) in caplog.text


@pytest.mark.parametrize("file", PLACES)
def test_wrong_values_are_left_out_and_told(file, tmp_path, quick, caplog):
    """Whatever stands in the place of what the page reads."""
    for number, (place, value) in enumerate(itertools.product(PLACES[file], JUNK)):
        folder = whole_run(tmp_path / str(number))
        lines = (folder / file).read_text().splitlines(keepends=True)
        content = json.loads(lines[-1])
        inside = content
        for key in place[:-1]:
            inside = inside[key]
        right = {"step": [0], "loss": [None, -1, 0, math.nan], "tokens": [None, -1, 0, math.nan]}
        right |= {"0": [-1, 0], "depth": [0], "length": [0], "head": [0], "peak_bytes": [0]}
        right |= {name: [None, {}] for name in ("model", "data")}
        right |= {name: [None, {}, {"a": 1}] for name in ("run", "hardware")}
        right |= {"name": ["text", 1e308, math.nan]}
        right |= {name: ["text"] for name in ("date", "tokenizer", "device")}
        inside[place[-1]] = value
        (folder / file).write_text("".join([*lines[:-1], json.dumps(content) + "\n"]))
        usable = any(repr(value) == repr(one) for one in right.get(str(place[-1]), []))
        assert told(folder / file, caplog) or usable, (place, value)


@pytest.mark.parametrize("file", PLACES)
def test_damaged_files_are_left_out_and_told(file, tmp_path, quick, caplog):
    laughs = "\n".join(f"{b}: &{b} [{','.join(9 * [f'*{a}'])}]" for a, b in pairwise("abcdefghij"))
    contents = [b"\xff\xfe\0", b"[" * 10**5 + b"\n", b'{"a":' * 10**5 + b"\n", b"[1]\n"]
    contents += [b'{"step": %s}\n' % (b"9" * 5000), b"3\n", b'{"date": {1: 2}}\n', b"a: [\n"]
    if file == "config.yaml":
        contents += [f"a: &a [1]\n{laughs}\n".encode(), b"a: &a {b: *a}\n", b"a: 2020-99-99\n"]
        contents += [b"a: !!python/object/apply:os.getcwd []\n", b"1: 2\n", b"a: !!binary aGk=\n"]
    folder = whole_run(tmp_path / "run")
    path = folder / file
    for content in contents:
        path.write_bytes(content + b"\n")
        assert told(path, caplog), content[:80]
    path.unlink()
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(path)
        assert told(path, caplog), make
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_prediction_of_other_settings_is_not_drawn_over_lengths(run, tmp_path, caplog):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    config = folder / "config.yaml"
    for now in ("num_layers: 200000", "sequence_length: 100", "micro_batch_size: 1000000"):
        whole = (run / "config.yaml").read_text()
        name = now.partition(":")[0]
        config.write_text(re.sub(rf"\b{name}: \d+", now, whole, count=1))
        caplog.clear()
        (report,) = over_lengths(read_run(folder))
        assert report["sequence_length"] == 400
        assert f"{config} cannot be planned with" in caplog.text


def test_a_page_that_cannot_be_written_is_named(tmp_path, quick, capsys, monkeypatch):
    folder = whole_run(tmp_path / "run")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main([f"run.dir={folder}"]) == 1
    assert f"{folder}/report.html cannot be written (No space left" in capsys.readouterr().err
    assert not list(folder.glob("*report.html*"))
    assert not list(folder.glob(".report*"))


def test_memory_over_lengths_is_that_of_what_auto_chose():
    asked = compose(["memory.policy=auto", "optimizer.max_grad_norm=null", "model.num_layers=2"])
    asked = replace(asked, data=replace(asked.data, sequence_length=2048))
    target = make_target(asked, find_device("cpu"))
    for group in settings(asked):
        for chosen in group:
            if chosen.memory.policy == "mst":
                found = _as_planned(asked, predict(chosen, target).report())
                keep = Policy.from_config(chosen.memory).keep
                memory = replace(chosen.memory, keep=KeepConfig(**keep))
                assert (found.memory, found.optimizer) == (memory, chosen.optimizer)
