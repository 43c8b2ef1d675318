"""Which tokens train and which validate.

A stream is a list of spans, [spans, 2] int64: token ranges [start, end) of the corpus, in order.
Whole documents are held out where that is possible; where it is not (one huge document, or
documents that are all longer than what may be held out), the end of the corpus is.

The choice depends on the documents' lengths and on ``data.validation_fraction`` and
``data.sequence_length``, not on ``train.seed``: runs with other seeds validate on the same text.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mst_train.data.corpus import Documents
from mst_train.data.order import pseudo_random, pseudo_random_order
from mst_train.errors import UserError

Ints = NDArray[np.int64]

SPLIT_KEY = 0x7370_6C69_7400
MANY_DOCUMENTS = 1 << 16
"""From here on it is ranges of documents that are held out, and most lengths stay unread."""
RANGES = 64
CHUNK_DOCUMENTS = 1 << 16


def split_corpus(documents: Documents, fraction: float, sequence_length: int) -> dict[str, Ints]:
    """The spans of the streams: "training" and, unless ``fraction`` is 0, "validation".

    Every token of the corpus is in one span of one stream. Each stream is long enough for one
    sequence of ``sequence_length`` + 1 tokens. Of more than MANY_DOCUMENTS, RANGES runs of
    neighbouring documents are held out, spread evenly over the corpus at places that are fixed but
    not regular.

    Raises:
        UserError: the corpus is too short for that.
    """
    count = len(documents)
    total, minimum = documents.start(count), sequence_length + 1
    if total < (2 * minimum if fraction else minimum):
        raise _too_short(total, fraction, sequence_length)
    if not fraction:
        return {"training": np.array([[0, total]])}
    target = max(int(fraction * total), minimum)
    if count > MANY_DOCUMENTS:
        training, validation = _split_ranges(documents, total, target)
    else:
        offsets = documents.borders(0, count)
        spans = np.stack([offsets[:-1], offsets[1:]], axis=1)
        numbers = split_documents(np.diff(offsets), fraction, minimum)
        training, validation = (spans[chosen] for chosen in numbers)
    held_out = int((validation[:, 1] - validation[:, 0]).sum())
    if held_out < minimum or total - held_out < minimum:
        border = total - min(target, total - minimum)
        return {"training": np.array([[0, border]]), "validation": np.array([[border, total]])}
    return {"training": merged(training), "validation": merged(validation)}


def _split_ranges(documents: Documents, total: int, target: int) -> tuple[Ints, Ints]:
    """Hold out about ``target`` of ``total`` tokens; looks up 2 * RANGES documents."""
    width, length = total // RANGES, -(-target // RANGES)
    borders = [0]
    for index in range(RANGES):
        free = max(1, width - length)
        start = index * width + pseudo_random(SPLIT_KEY, index) % free
        end = min(start + length, total - 1)
        borders += [documents.start(documents.at(place)) for place in (start, end)]
    spans = np.array([*borders, total]).reshape(-1, 2)  # of training, with the gaps between them
    validation = np.stack([spans[:-1, 1], spans[1:, 0]], axis=1)
    training, validation = (part[part[:, 0] < part[:, 1]] for part in (spans, validation))
    return training, validation


def split_documents(lengths: Ints, fraction: float, minimum_tokens: int) -> tuple[Ints, Ints]:
    """Hold out about ``fraction`` of the tokens, at least ``minimum_tokens``, in whole documents.

    Documents that are no longer than the target, max(fraction * total, minimum_tokens), are taken
    in a fixed pseudo-random order while they fit into it. One more is taken where they would come
    to less than ``minimum_tokens``, so that less than twice the target is ever held out.

    Args:
        lengths: [documents] int64, tokens of each with its end-of-document token.

    Returns:
        (training ids, validation ids), both ascending int64. No validation ids where the documents
        cannot give ``minimum_tokens`` to both streams.
    """
    total = int(lengths.sum())
    target = max(int(fraction * total), minimum_tokens)
    order = pseudo_random_order(len(lengths), SPLIT_KEY)
    order = order[lengths[order] <= target]
    held_out = np.cumsum(lengths[order])
    count = max(
        int(np.searchsorted(held_out, target, side="right")),
        int(np.searchsorted(held_out, minimum_tokens)) + 1,
    )
    count = min(count, len(order))
    tokens = int(held_out[count - 1]) if count else 0
    if tokens < minimum_tokens or total - tokens < minimum_tokens:
        count = 0
    is_validation = np.zeros(len(lengths), bool)
    is_validation[order[:count]] = True
    return np.flatnonzero(~is_validation), np.flatnonzero(is_validation)


def documents_in(documents: Documents, spans: Ints) -> Iterator[tuple[Ints, bool]]:
    """The documents of a stream, CHUNK_DOCUMENTS at most at a time.

    Yields:
        ([n + 1] where n neighbouring documents start and the last one ends, both within the span;
        whether the last one goes on behind it).
    """
    for start, end in spans.tolist():
        first, last = documents.at(start), documents.at(end - 1) + 1
        for low in range(first, last, CHUNK_DOCUMENTS):
            borders = documents.borders(low, min(low + CHUNK_DOCUMENTS, last))
            yield borders.clip(start, end), bool(borders[-1] > end)


def long_documents(documents: Documents, spans: Ints, minimum: int) -> Ints:
    """The spans of the stream's documents that have at least ``minimum`` tokens."""
    found = [np.empty((0, 2), np.int64)]
    for borders, _ in documents_in(documents, spans):
        pairs = np.stack([borders[:-1], borders[1:]], axis=1)
        pairs = pairs[pairs[:, 1] - pairs[:, 0] >= minimum]
        if len(pairs):
            found.append(merged(pairs))
    pairs = np.concatenate(found)
    return merged(pairs) if len(pairs) else pairs


def merged(spans: Ints) -> Ints:
    """``spans`` with those joined that follow each other without a gap."""
    follows = spans[1:, 0] == spans[:-1, 1]
    starts = spans[np.concatenate([[True], ~follows]), 0]
    ends = spans[np.concatenate([~follows, [True]]), 1]
    return np.stack([starts, ends], axis=1)


def _too_short(total: int, fraction: float, sequence_length: int) -> UserError:
    asked = f"data.source holds {total} tokens, but data.sequence_length={sequence_length}"
    remedies = []
    if fraction:
        asked += (
            f" needs {2 * (sequence_length + 1)}: a sequence of {sequence_length + 1} (one token "
            f"more, to predict) for training and one for validation"
        )
        if total >= 4:
            remedies.append(f"set data.sequence_length to {total // 2 - 1} or less")
        if total > sequence_length:
            remedies.append("set data.validation_fraction=0")
    else:
        asked += f" needs {sequence_length + 1} (one token more, to predict)"
        if total >= 2:
            remedies.append(f"set data.sequence_length to {total - 1} or less")
    return UserError(f"{asked}: {', or '.join([*remedies, 'give more text'])}")
