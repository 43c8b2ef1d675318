"""The script for a GPU machine: what fails does not stop the rest, and it goes on where it was."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.py"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """gpu(pieces, *arguments): the exit status; the script's own names are in gpu.names."""

    def main(pieces=None, *arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), *arguments])
        if pieces is not None:
            main.names["main"].__globals__["PIECES"] = pieces
        return main.names["main"]()

    main.names = runpy.run_path(str(SCRIPT))
    return main


def test_what_fails_is_told_and_the_rest_goes_on(gpu, tmp_path, capsys):
    piece = gpu.names["Piece"]
    pieces = [
        piece("endless", "http.server", ("0", "--bind", "127.0.0.1"), 1),
        piece("broken", "no_such_module", (), 60),
        piece("fine", "this", (), 60),
    ]
    assert gpu(pieces) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [found["status"] for found in summary.values()] == [None, 1, 0]
    assert "No module named no_such_module" in (tmp_path / "broken.log").read_text()
    page = (tmp_path / "summary.md").read_text()
    assert "| endless: out of time, see endless.log |" in page
    assert "| broken: status 1, see broken.log |" in page
    assert "| fine: ok in " in page
    printed = capsys.readouterr().out
    assert printed.index("endless") < printed.index("broken") < printed.index("fine")

    pieces[1] = piece("broken", "this", (), 60)
    assert gpu(pieces[1:]) == 1  # endless is still not done
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [found["ok"] for found in summary.values()] == [False, True, True]


def test_what_is_done_is_not_done_again(gpu, tmp_path):
    piece = gpu.names["Piece"]
    assert gpu([piece("fine", "this", (), 60)]) == 0
    (tmp_path / "fine.log").unlink()
    assert gpu([piece("fine", "this", (), 60)]) == 0
    assert not (tmp_path / "fine.log").exists()


@pytest.mark.slow
def test_steps_are_beside_what_was_predicted(gpu, tmp_path):
    assert gpu(None, "--small", "--only", "step_60k", "--only", "offload", "--only", "short") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: len(found["rows"]) for name, found in summary.items()} == {
        "step_60k": 1,
        "short": 3,
        "offload": 1,
    }
    for name in ("step_60k", "offload"):
        (row,) = summary[name]["rows"]
        assert row["problem"] is None and row["predicted_bytes"] > 0 < row["predicted_seconds"]
    assert all("predicted_bytes" not in row for row in summary["short"]["rows"])
    assert (tmp_path / "step_60k/results.png").exists()
