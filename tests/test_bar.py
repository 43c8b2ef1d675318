"""What is said of progress where there is no terminal."""

import logging
import sys

import pytest

from mst_train import bar as subject
from mst_train.bar import bar


class Clock:
    """Six seconds pass whenever somebody looks."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 6
        return self.now


@pytest.fixture(autouse=True)
def lines(monkeypatch, caplog):
    monkeypatch.setattr(subject, "time", Clock())
    caplog.set_level(logging.INFO, "mst_train.bar")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_line_now_and_then(lines, capsys):
    assert list(bar("abcd", desc="texts", leave=False, disable=None)) == [*"abcd"]
    assert lines() == [
        "texts: 2 of 4, 12 s so far, 12 s left",
        "texts: 4 of 4, 24 s so far, 0 s left",
    ]
    assert capsys.readouterr().err == ""


def test_without_a_total_and_with_what_was_last(lines):
    with bar(desc="predicting", unit=" steps", disable=None) as shown:
        for name in ("first", "second", "third"):
            shown.set_postfix_str(name)
            shown.update()
    assert lines() == ["predicting: 2 steps, 12 s so far (second)"]


def test_what_is_short_or_switched_off_says_nothing(lines, monkeypatch):
    list(bar("abcd", disable=True))
    monkeypatch.setattr(subject, "SILENT_SECONDS", 60)
    list(bar("abcd", disable=None))
    assert not lines()


def test_a_terminal_has_a_bar_and_no_lines(lines, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(bar("abcd", desc="texts", disable=None)) == [*"abcd"]
    assert "texts: 100%" in capsys.readouterr().err
    assert not lines()


def test_without_tqdm_there_are_lines(lines, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    list(bar("abcd", desc="texts", disable=None))
    assert lines()
