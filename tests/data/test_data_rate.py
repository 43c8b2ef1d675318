"""How far tokenising has come, as a terminal and a log show it."""

import logging

import pytest

from mst_train.data import rate
from mst_train.data.rate import Rate


class Clock:
    """Half a minute passes whenever somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 30
        return self.now


def test_a_bar_has_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Rate("corpus/", 4_000_000, 1_000_000) as progress:
        progress.add(1_000_000, 250_000)
    shown = capsys.readouterr().err
    assert "tokenising corpus/:  50%" in shown
    assert "2.00M/4.00M" in shown
    assert "k tokens/s" in shown
    assert "<00:" in shown  # the time left


def test_a_log_has_a_line_each_minute(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(rate, "time", Clock())
    with Rate("corpus/", 40_000_000, 10_000_000) as progress:
        for _ in range(5):
            progress.add(4_000_000, 1_000_000)
        assert progress.tokens == 5_000_000
    assert capsys.readouterr().err == ""
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) >= 3
    assert lines[0] == "tokenising 30.0 MB of corpus/"
    assert lines[1].startswith("tokenising corpus/: ")
    assert " MB of 40 MB, " in lines[1] and " minutes left, " in lines[1]
    assert lines[1].endswith(" tokens/s")
