"""How far back a text has what tells its next token: an estimate by counting, without a model.

An n-gram model of order 0 to ORDERS[-1] gives each token a probability. At each order, c of the C
occurrences of the n tokens before it went on with this token, and

    p_n = (c + smoothing * p_lower) / (C + smoothing)

(MacKay and Peto, 1995: hierarchical Dirichlet), from 1 / vocabulary at the lowest. Occurrences are
those in the training text, and those among the last ``window`` tokens of the text itself: how much
lower the loss is with a longer window is what the text's own past adds to what all of it has in
common.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mst_train.cli.compose import compose
from mst_train.data import load_data
from mst_train.data.packing import Sequences
from mst_train.paper import text

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

ORDERS = (0, 1, 2, 3, 4, 5, 6, 8, 12)
SMOOTHINGS = (2.0, 4.0, 8.0, 16.0)
"""Of these each window has the one with the lowest loss, so that none is at a disadvantage."""

WINDOWS = (0, 128, 512, 2048, 4096)
TEXTS = 12
"""Held-out ones, each twice as long as the longest window."""

_ODD = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD6E8FEB86659FD93)


def how_far_back(advance: Callable[[str], None]) -> dict[str, Any]:
    """The losses at the scale of the page."""
    advance("reading the text")
    longest = max(WINDOWS)
    with text.prepared() as overrides:
        data = load_data(compose([*overrides, f"data.sequence_length={2 * longest}"]).data)
        assert data.validation is not None
        texts = _some(data.validation, TEXTS)
        training = _some(data.training, len(data.training)).ravel()
    advance("counting")
    losses = reach(training, texts, WINDOWS, text.VOCABULARY, longest)
    return {
        "text": text.name(),
        "training_tokens": training.size,
        "scored_tokens": texts[:, longest:].size,
        "losses": [{"window": window, "loss": loss} for window, loss in losses.items()],
    }


def _some(sequences: Sequences, limit: int) -> Ints:
    """[sequences, length], spread over all of them."""
    return np.stack([sequences[number].tokens for number in sequences.spread(limit)])


def reach(
    training: Ints, texts: Ints, windows: Sequence[int], vocab_size: int, first: int
) -> dict[int, float]:
    """The loss in nats per token, for each window.

    Args:
        training: [tokens] what is known beforehand.
        texts: [texts, length], each seen on its own.
        windows: how many tokens of the text's own past are counted; 0: none.
        vocab_size: how many ids there are.
        first: the first place of each text whose loss counts; the longest window or more, so that
            all windows are full and all means are over the same tokens.
    """
    known = [_known(training, texts, order) for order in ORDERS]
    losses = {}
    for window in windows:
        recent = [_recent(texts, order, window) for order in ORDERS]
        counts = [
            (c + own, total + all_own)
            for (c, total), (own, all_own) in zip(known, recent, strict=True)
        ]
        losses[window] = min(
            float(-np.log(_probabilities(counts, vocab_size, smoothing)[:, first:]).mean())
            for smoothing in SMOOTHINGS
        )
    return losses


def _probabilities(
    counts: Iterable[tuple[Ints, Ints]], vocab_size: int, smoothing: float
) -> NDArray[np.float64]:
    """[texts, length] of the tokens, from (c, C) of each order, the lowest first."""
    found: NDArray[np.float64] | float = 1 / vocab_size
    for same, total in counts:
        found = (same + smoothing * found) / (total + smoothing)
    return np.asarray(found)


def _known(training: Ints, texts: Ints, order: int) -> tuple[Ints, Ints]:
    """(c, C) in the training text, each [texts, length]."""
    there, here = _hashes(training, order), _hashes(texts, order)
    same, total = (_occurrences(a, b) for a, b in zip(there, here, strict=True))
    return same, total


def _occurrences(there: Hashes, here: Hashes) -> Ints:
    there = np.sort(there)
    below, above = (np.searchsorted(there, here, side=side) for side in ("left", "right"))
    return above - below


def _recent(texts: Ints, order: int, window: int) -> tuple[Ints, Ints]:
    """(c, C) among the ``window`` tokens before each, within its text."""
    rows = np.arange(len(texts), dtype=np.uint64)[:, None] * _MIX
    same, total = (_earlier(_mixed(rows, found), window) for found in _hashes(texts, order))
    return same, total


def _earlier(hashes: Hashes, window: int) -> Ints:
    """How many of the ``window`` places before each have the same hash."""
    _, groups = np.unique(hashes.ravel(), return_inverse=True)
    count = hashes.size
    # One number for group and place: those of a group stand together, in the order of their places.
    firsts = groups.astype(np.int64) * count
    numbers = firsts + np.arange(count)
    ordered = np.sort(numbers)
    before = np.searchsorted(ordered, numbers)
    outside = np.searchsorted(ordered, np.maximum(numbers - window, firsts))
    found: Ints = (before - outside).reshape(hashes.shape)
    return found


def _hashes(tokens: Ints, order: int) -> tuple[Hashes, Hashes]:
    """Of each token with the ``order`` before it, and of these alone; [..., length] each.

    64 bits, so that two that differ are alike by chance once in 10^19 pairs. Places that do not
    have so many tokens before them count those that there are.
    """
    ids = tokens.astype(np.uint64) + np.uint64(1)
    context = np.full_like(ids, _ODD)
    for distance in range(1, order + 1):
        shifted = np.zeros_like(ids)
        shifted[..., distance:] = ids[..., :-distance]
        context = _mixed(context, shifted)
    return _mixed(context, ids), context


def _mixed(hashes: Hashes, values: Hashes) -> Hashes:
    mixed = (hashes ^ (values * _ODD)) * _MIX
    mixed ^= mixed >> np.uint64(32)
    return mixed
