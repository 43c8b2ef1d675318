"""The page and its pictures say what the reports say."""

import json
import warnings

import pytest

from mst_train.paper import __main__ as command
from mst_train.paper import page
from mst_train.paper.pieces import PIECES


@pytest.fixture
def written(tmp_path, reports):
    """written(name, ...): the page of these pieces."""

    def write(*names):
        for name in names:
            (tmp_path / f"{name}.json").write_text(json.dumps(reports[name]))
        return page.write(tmp_path).read_text()

    return write


def cells(text, first):
    """The cells of the table row that begins with ``first``."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_recalled_lengths_are_marked_and_confirmed_ones_are_not(written):
    text = written("longest")
    assert cells(text, "Llama3-8B")[1:4] == ["5K †", "14K †", "60K"]
    assert cells(text, "Gemma-2-9B")[1:4] == ["1.5K †", "14K †", "36K †"]
    assert "recalled" in text and "not confirmed" in text


def test_predicted_lengths_and_their_ratios(written):
    text = written("longest")
    llama = cells(text, "Llama3-8B")
    assert llama[4:] == ["4K", "16K", "**104K**", "945K", "26x (6.5x)", "1.73x"]
    gemma = cells(text, "Gemma-2-9B")
    assert gemma[4:] == ["none", "6.25K", "**63K**", "", "none (10.1x)", "1.75x"]
    assert "between 0.45 and 1.14" in " ".join(text.split())  # 6.25 of 14, 16 of 14


def test_what_does_not_fit_is_said_and_not_bold(written):
    text = written("several", "lengths")
    assert "does not fit: 60.00 GiB on each" in cells(text, "Llama3-8B")
    assert cells(text, "8K")[1:] == ["100.00 GiB, 6.5 s", "**60.00 GiB, 6.5 s**"]


def test_every_section_names_its_origin(written, reports):
    text = " ".join(written(*reports).split())
    for name in reports:
        assert f"[{name}.json]({name}.json): `python -m mst_train.paper`, 2026-01-02" in text
    assert text.count("commit 0123456789ab, python 3.11, torch 2.13, transformers 5.0;") == 5
    assert "not yet measured" in text
    assert "{" not in text


def test_losses_are_compared_as_they_are(written):
    text = " ".join(written("convergence").split())
    assert "a lower (4.40 against 4.90) loss" in text
    assert "a higher (4.60 against 4.20) one" in text
    assert "at most 2.5e-06 of the loss in 4 steps" in text
    row = cells(written("convergence"), "16 tokens")
    assert row == ["16 tokens", "mst", "500 ms", "4.900", "4.500", "4.350", "4.200"]


def test_a_piece_that_was_not_made_is_named(written):
    assert "Not made yet: `python -m mst_train.paper --only longest`" in written("several")


def test_every_piece_has_a_section_and_a_name():
    assert tuple(PIECES) == tuple(page.SECTIONS) == command.NAMES


@pytest.mark.parametrize("name", [name for name, piece in PIECES.items() if piece.draw])
def test_pictures_are_drawn_and_shown(name, reports, tmp_path, written):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as a layout that does not fit
        PIECES[name].draw(reports[name], tmp_path / f"{name}.png")
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert f"]({name}.png)" in written(name)
