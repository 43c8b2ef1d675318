"""The examples run, and show what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_huggingface_before_after():
    pytest.importorskip("transformers")
    result = subprocess.run(
        [sys.executable, EXAMPLES / "huggingface_before_after.py", "1024"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    before, after, ratio = result.stdout.splitlines()
    losses = [[float(x) for x in re.findall(r"\d+\.\d{5}", line)] for line in (before, after)]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=2e-4)
    peaks = [float(re.search(r"([\d.]+) MiB", line)[1]) for line in (before, after)]
    assert peaks[0] / peaks[1] > 2
    assert ratio == f"1024 tokens, {peaks[0] / peaks[1]:.1f} times less"
