"""Numbers and paragraphs as the page shows them."""

import textwrap
from typing import Any

from mst_train.paper.reported import K
from mst_train.plan.show import duration as duration

WIDTH = 110


def prose(text: str, **values: Any) -> str:
    """One paragraph: ``text`` with its values, in lines of a page's width."""
    words = " ".join(text.format(**values).split())
    return textwrap.fill(words, WIDTH, break_long_words=False, break_on_hyphens=False)


def short_number(tokens: float) -> str:
    """Tokens in units of 1,024."""
    return f"{tokens / K:.4g}K"


def tokens_of(prediction: dict[str, Any] | None) -> str:
    """The length that was predicted for; "none" where none fits."""
    return "none" if prediction is None else short_number(prediction["sequence_length"])
