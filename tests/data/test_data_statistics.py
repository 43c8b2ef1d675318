"""The picture of documents' lengths in a prepared folder."""

import re

import pytest

from mst_train.data.statistics import lengths_figure


@pytest.mark.parametrize("most", [7, 20_000])
def test_the_picture_counts_in_plain_numbers_and_shows_a_single_document(most: int) -> None:
    counts = {64: 1, 1024: most}
    bins = [{"from": n, "documents": c, "tokens": n * c} for n, c in counts.items()]
    figure = lengths_figure({"lengths": bins, "sequence_length": 1024})
    figure.draw_without_rendering()
    for panel in figure.axes:
        bottom, _ = panel.get_ylim()
        labels = [
            label.get_text()
            for axis in (panel.xaxis, panel.yaxis)
            for label in [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)]
        ]
        assert "1K" in labels
        assert all(re.fullmatch(r"-?[\d,.]*K?", label) for label in labels)
        assert all(bar.get_height() > bottom for bar in panel.patches)
    assert figure.axes[0].get_yscale() == ("linear" if most == 7 else "log")
