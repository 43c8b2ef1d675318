"""The examples run, and show what they say."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


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
