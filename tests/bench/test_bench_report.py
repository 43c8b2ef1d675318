"""Numbers as a reader sees them."""

import json
import sys

import pytest

from mst_train.bench import plot, report
from mst_train.bench.__main__ import main, write


def row(variant, seconds, peak=3 * 2**30, tokens=8192, **other):
    return {
        "work": "step",
        "tokens": tokens,
        "variant": variant,
        "seconds": [seconds] if seconds else [],
        "cpu_seconds": [2 * seconds] if seconds else [],
        "median_seconds": seconds,
        "tokens_per_second": seconds and tokens / seconds,
        "peak_bytes": peak,
        "problem": None,
        "failed": False,
        **other,
    }


def results(*rows, bench="step"):
    model = {"num_layers": 4, "hidden_size": 512, "intermediate_size": 1792, "vocab_size": 8192}
    return {
        "bench": bench,
        "command": "python -m mst_train.bench +bench=step",
        "date": "2026-01-01T00:00:00+00:00",
        "git_commit": "abc",
        "hardware": {"cpu": "A CPU", "threads": 2, "load_average": 0.5},
        "versions": {"torch": "2.13.0"},
        "settings": {"precision": "fp32", "model": model, "bench": {"repetitions": 1}},
        "rows": list(rows),
        "problems": [],
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.00123456, "1.23 ms"), (0.0456, "45.6 ms"), (0.456, "456 ms"), (1.5, "1.50 s"),
     (45.67, "45.7 s"), (1234.5, "1,234 s"), (None, None)],
)  # fmt: skip
def test_durations(seconds, text):
    assert report.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(2**20, "1.00 MiB"), (355 * 2**20, "355 MiB"), (int(2.16 * 2**30), "2.16 GiB"), (None, None)],
)
def test_sizes(count, text):
    assert report.size(count) == text


def test_the_table_compares_with_the_reference():
    page = report.markdown(
        results(row("recompute", 10.0), row("mst", 8.5, 2**29, loss=9.1234567), row("vanilla", 9.0))
    )
    lines = page.splitlines()
    assert (
        "| tokens | variant | time | best | CPU time | relative | tokens/s | peak | loss |" in lines
    )
    assert "| 8,192 | mst | 8.50 s | 8.50 s | 17.0 s | 0.85 | 964 | 512 MiB | 9.123457 |" in lines
    assert "| 8,192 | recompute | 10.0 s | 10.0 s | 20.0 s | 1.00 | 819 | 3.00 GiB |  |" in lines


def test_a_variant_that_did_not_run_says_why():
    page = report.plain(results(row("mst", 1.0), row("liger", None, None, problem="not run: x")))
    assert page.splitlines()[2].split() == ["8,192", "transformers,", "Liger", "not", "run:", "x"]


@pytest.mark.parametrize("lengths", [(8192,), (256, 1024, 8192)])
def test_it_draws(tmp_path, lengths):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [
        row(variant, 1.0 + i, 2**28 + i, tokens)
        for tokens in lengths
        for i, variant in enumerate(("vanilla", "recompute", "mst"))
    ]
    source = tmp_path / "results.json"
    source.write_text(json.dumps(results(*rows, row("mst_offload", None, None))))
    assert plot.main([str(source)]) == 0
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("bench", plot.TITLES)
def test_the_caption_tells_of_ratios_where_times_are_drawn(bench):
    caption = plot._caption(results(bench=bench))
    assert "hidden 512" in caption
    assert ("ratios" in caption) == (bench != "max_sequence")


def test_nothing_measured_still_draws(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot.draw(results(row("mst", None, None)), tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()


def test_without_matplotlib_it_says_how_to_draw_later(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lines = write(results(row("mst", 1.0)), tmp_path)
    assert f"python -m mst_train.bench.plot {tmp_path / 'results.json'}" in lines[1]
    assert not (tmp_path / "results.png").exists()


@pytest.mark.parametrize("text", ["{}", "not json"])
def test_a_file_that_is_no_result_is_refused(tmp_path, capsys, text):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    source = tmp_path / "x.json"
    source.write_text(text)
    assert plot.main([str(source)]) == 2
    assert "is not a bench's results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no bench is named"),
        (["+bench=stp"], "did you mean step"),
        (["+bench=step", "bench.repetition=3"], "bench.repetition is not a setting"),
        (["+bench=step", "bench.repetitions=0"], "bench.repetitions=0 must be at least 1"),
        (["+bench=step", "bench.lengths=[0]"], "bench.lengths=0 must be at least 2"),
        (["+bench=step", "data.sequence_length=64"], "the bench measures bench.lengths=[8192]"),
        (["+bench=step", "bench.output=xml"], "bench.output=xml is not one of table, json"),
        (["+bench=step", "bench.variants=[nobody]"], "bench.variants names nobody"),
        (["+bench=step", "model.num_heads=3"], "model.num_heads=3"),
    ],
)
def test_what_cannot_be_is_refused(arguments, said, tmp_path, capsys):
    status = main([*arguments, f"bench.dir={tmp_path / 'results'}"])
    printed = capsys.readouterr()
    assert status == 2 and said in printed.err and printed.out == ""
    assert not (tmp_path / "results").exists()


def test_the_table_is_what_is_printed(tmp_path, capsys):
    arguments = "model.vocab_size=64 model.hidden_size=32 model.num_heads=2 model.num_kv_heads=2"
    status = main(
        ["+bench=step", *arguments.split(), "bench.lengths=[32]", "bench.threads=1",
         "bench.variants=[recompute,mst]", f"bench.dir={tmp_path}"]
    )  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert status == 0 and printed[0].split()[:3] == ["tokens", "variant", "time"]
    assert printed[2].split()[1] == "mst"


@pytest.mark.parametrize("option", ["--help", "--config"])
def test_help(option, capsys):
    assert main([option]) == 0
    assert "repetitions" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["step", "systems", "peers", "short"])
def test_presets_for_gpus_hold_the_papers_model(name):
    from mst_train.bench.config import read

    config = read([f"+bench={name}_gpu"])
    assert (config.bench.kind, config.bench.name) == (name, f"{name}_gpu")
    assert (config.model.hidden_size, config.model.vocab_size) == (4096, 128256)
    assert config.precision == "bf16"
    assert read([f"+bench={name}_gpu", "model=llama2_7b"]).model.vocab_size == 32000
