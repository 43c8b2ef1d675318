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
    assert text.count("commit 0123456789ab, python 3.11, torch 2.13, transformers 5.0;") == len(
        reports
    )
    assert "not yet measured" in text
    assert "{" not in text


def test_losses_are_compared_as_they_are(written, reports):
    text = written("convergence")
    said = " ".join(text.split())
    assert "the long one's loss is lower in all seeds" in said
    assert "goes from 4.500 to 4.200; with 16 tokens of context instead of 64" in said
    assert "the last cost them 4.700" in said
    assert "at most 2.5e-06 of the loss in 4 steps" in said
    assert "In float64 by AdamW they differ by at most 1.5e-13 in 3 steps" in said
    assert cells(text, "16 tokens") == ["16 tokens", "500 ms", "4.900", "4.500", "4.200", "4.700"]
    name = "each with its own context"
    assert cells(text, name) == [name, "-0.2500 ± 0.6350", "-0.3000, -0.2000"]


@pytest.mark.parametrize(
    ("values", "said"),
    [([0.1, 0.2], "higher in all seeds"), ([-0.1, 0.2], "lower in 1 of 2 seeds")],
)
def test_a_loss_that_is_not_lower_is_not_called_so(written, reports, values, said):
    differences = reports["convergence"]["long_minus_short"]
    differences["each with its own context"]["values"] = values
    assert said in " ".join(written("convergence").split())


def test_what_lies_far_back_is_told_in_shares(written):
    text = written("reach")
    assert cells(text, "2,048") == ["2,048", "1.300", "0.300"]
    said = " ".join(text.split())
    assert "Beyond the last 512 tokens lie 56% of what" in said
    assert "and 31% of the loss; beyond 2,048, 22%" in said


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
