"""The page of a run: what is on it, that it loads nothing, and what it is made from."""

import json
import re
from html.parser import HTMLParser

import pytest

from mst_train.memory.tracker import KINDS
from mst_train.report import charts
from mst_train.report.__main__ import main
from mst_train.report.page import DARK, LIGHT
from mst_train.report.read import read_run
from mst_train.train import train

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
        if name.startswith("xmlns"):
            continue
        assert not re.search(r"https?:|//", value or ""), (tag, name, value)
    tags = {tag for tag, _, _ in page.attributes} | set(re.findall(r"<(\w+)", text))
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "base"}
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "@import" not in text
    assert "@font-face" not in text
    assert all(inside.startswith("#") for inside in re.findall(r"url\(([^)]*)\)", text))


def test_light_and_dark_have_every_colour_that_is_used(run):
    text = written(run)
    assert set(LIGHT) == set(DARK)
    used = set(re.findall(r"var\(--([\w-]+)\)", text)) - {"share"}
    assert used <= set(LIGHT)
    assert {f"area-{kind}" for kind in (*KINDS, "overhead")} <= set(LIGHT)
    assert {f"line-{number}" for number in range(len(charts.LINES))} <= set(LIGHT)
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


def test_smooth_is_the_mean_around():
    assert charts.smooth([0.0, 0.0, 5.0, 0.0, 0.0, 0.0]) == pytest.approx(
        [5 / 3, 5 / 4, 1.0, 1.0, 5 / 4, 0.0]
    )
    assert charts.smooth([2.0]) == [2.0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0"), (0.0003, "0.0003"), (950.0, "950"), (1500.0, "1.5K"), (2.5e6, "2.5M")],
)
def test_short_numbers(value, expected):
    assert charts.short(value) == expected
