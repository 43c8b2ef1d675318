"""The examples run, and show what they say."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_small_gpt(monkeypatch, capsys):
    example = str(EXAMPLES / "small_gpt.py")
    monkeypatch.setattr(sys, "argv", [example, "1024"])
    runpy.run_path(example, run_name="__main__")
    plain, chunked, ratio = capsys.readouterr().out.splitlines()
    found = [re.findall(r"[\d.]+", line.partition("loss")[2]) for line in (plain, chunked)]
    assert found[0][:2] == found[1][:2]
    assert int(found[0][2]) / int(found[1][2]) > 3
    assert ratio.startswith("1024 tokens, ")


def test_huggingface_before_after(monkeypatch, capsys):
    pytest.importorskip("transformers")
    example = str(EXAMPLES / "huggingface_before_after.py")
    monkeypatch.setattr(sys, "argv", [example, "1024"])
    capsys.readouterr()  # what importing a package may have printed
    runpy.run_path(example, run_name="__main__")
    before, after, ratio = capsys.readouterr().out.splitlines()
    losses = [[float(x) for x in re.findall(r"\d+\.\d{5}", line)] for line in (before, after)]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=2e-4)
    peaks = [float(re.search(r"([\d.]+) MiB", line)[1]) for line in (before, after)]
    assert peaks[0] / peaks[1] > 2
    assert ratio == f"1024 tokens, {peaks[0] / peaks[1]:.1f} times less"
