"""Best-fit packing: documents to sequences without cutting one that fits into a sequence.

As in "Fewer Truncations Improve Language Modeling" (Ding et al., 2024): a document that is longer
than a sequence gives full sequences and a rest; documents and rests are put, the longest first,
where they leave the least room. That is done in windows of neighbouring documents, so that neither
memory nor time grow with the corpus, and the result is kept in an index on disk.
"""

import json
import tempfile
from bisect import bisect_left, insort
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mst_train.bar import bar
from mst_train.data.checked import CheckedArray, CheckedWriter, Written
from mst_train.data.corpus import Corpus, Documents, TokenFiles
from mst_train.data.manifest import inside, parsed
from mst_train.data.packing import IGNORED, Sequence, Sequences, positions_from
from mst_train.data.splitting import documents_in
from mst_train.errors import UserError

Ints = NDArray[np.int64]

FORMAT = 1
"""Part of every index's name: raise it when the same documents would be packed otherwise."""
WINDOW_SEQUENCES = 64
WINDOW_TOKENS = 1 << 22
"""A window has the tokens of WINDOW_SEQUENCES sequences, and at least so many."""
CHUNK = 1 << 17
INDEX = "index.json"


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The items of each bin, by their numbers in ``lengths``; no length is above ``capacity``.

    Best fit decreasing: the longest item first, equal ones in their order, each into the bin that
    it leaves with the least room, the oldest of several.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room, bin) of each bin that has any, sorted
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[item]
        place = bisect_left(room, (length, 0))
        if place == len(room):
            left, number = capacity - length, len(bins)
            bins.append([item])
        else:
            free, number = room.pop(place)
            left = free - length
            bins[number].append(item)
        if left:
            insort(room, (left, number))
    return bins


def packed(documents: Documents, spans: Ints, length: int) -> Iterator[list[list[tuple[int, int]]]]:
    """The sequences of a stream, those of a window at a time: lists of (first token, tokens).

    Where a span ends within a document, its last token is there to be predicted alone. An
    end-of-document token by itself, which has nothing to predict, is left out.
    """
    limit = max(WINDOW_TOKENS, WINDOW_SEQUENCES * length)
    window: list[tuple[int, int]] = []
    tokens = 0
    for borders, goes_on in documents_in(documents, spans):
        ends = borders[1:].tolist()
        if goes_on:
            ends[-1] -= 1
        for index, (start, end) in enumerate(zip(borders[:-1].tolist(), ends, strict=True)):
            for first in range(start, end, length):
                size = min(length, end - first)
                if size > 1 or (goes_on and index == len(ends) - 1):
                    window.append((first, size))
                    tokens += size
            if tokens >= limit:
                yield _pack_window(window, length)
                window, tokens = [], 0
    if window:
        yield _pack_window(window, length)


def _pack_window(pieces: list[tuple[int, int]], length: int) -> list[list[tuple[int, int]]]:
    bins = best_fit([size for _, size in pieces], length)
    return [[pieces[item] for item in items] for items in bins]


class BestFitSequences(Sequences):
    """The sequences of an index: whole documents, or pieces of long ones, and padding behind them.

    The last token of a document has no label, nor has the padding, which is end-of-document
    tokens; a piece that is cut off has its document's next token as its last label.
    """

    def __init__(
        self,
        tokens: TokenFiles | NDArray[np.unsignedinteger],
        starts: CheckedArray | Ints,
        pieces: CheckedArray | Ints,
        sequence_length: int,
        eod: int,
        confined: bool,
    ) -> None:
        """
        Args:
            tokens: the corpus's.
            starts: [sequences + 1], where each sequence's pieces start in ``pieces``.
            pieces: [2 * pieces], first token and number of tokens of each.
            confined: whether attention and positions are those of each document by itself.
        """
        self.sequence_length = sequence_length
        self._tokens, self._starts, self._pieces = tokens, starts, pieces
        self._eod, self._confined = eod, confined

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Sequence:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        length = self.sequence_length
        first, last = self._starts[index : index + 2].tolist()
        tokens = np.full(length, self._eod, np.int64)
        labels = np.full(length, IGNORED, np.int64)
        starts = np.zeros(length, bool)
        place = 0
        pieces = self._pieces[2 * first : 2 * last].reshape(-1, 2)
        if int(pieces[:, 1].sum()) > length:
            raise UserError(
                f"the packing index of {self.sequence_length} tokens has a sequence with more: "
                f"delete the folder packing beside the tokens and in data.cache_dir"
            )
        for start, size in pieces.tolist():
            read = self._tokens[start : start + size + 1].astype(np.int64)
            inputs = read[:size]
            ends = inputs == self._eod
            end = place + size
            tokens[place:end] = inputs
            labels[place : place + len(read) - 1] = read[1:]
            labels[place:end][ends] = IGNORED
            starts[place] = True
            starts[place + 1 : end] = ends[:-1]
            place = end
        positions = np.arange(length)
        if not self._confined:
            return Sequence(tokens, labels, positions, None)
        starts[place : place + 1] = True
        borders = np.flatnonzero(starts)
        return Sequence(tokens, labels, positions_from(borders, positions), borders)

    def used_tokens(self) -> int:
        """Tokens in all sequences, without padding; reads the whole index."""
        parts = range(0, len(self._pieces), CHUNK)
        return sum(int(self._pieces[part : part + CHUNK][1::2].sum()) for part in parts)


def load_index(
    corpus: Corpus, key: str, streams: dict[str, Ints], length: int, places: list[Path]
) -> dict[str, tuple[CheckedArray, CheckedArray]]:
    """The index ``key`` in the first of ``places`` that has it; else it is made, in the last.

    Args:
        streams: the spans to pack, by name.

    Returns:
        For each stream its starts and pieces, as ``BestFitSequences`` takes them.

    Raises:
        UserError: an index is damaged.
        OSError: the last place cannot be written.
    """
    for place in places:
        if (place / key / INDEX).is_file():
            return _open_index(place, key, list(streams), len(corpus.tokens))
    places[-1].mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=places[-1], prefix=f".{key}-") as temporary:
        made = Path(temporary, "made")
        made.mkdir()
        files: dict[str, dict[str, int | str]] = {}
        for name, spans in streams.items():
            files |= _write_index(corpus.documents, name, spans, length, made)
        content = {"format": FORMAT, "sequence_length": length, "files": files}
        (made / INDEX).write_text(json.dumps(content, indent=1) + "\n")
        with suppress(OSError):  # another process may have put the same index there
            made.rename(places[-1] / key)
    return _open_index(places[-1], key, list(streams), len(corpus.tokens))


def _write_index(
    documents: Documents, name: str, spans: Ints, length: int, folder: Path
) -> dict[str, dict[str, int | str]]:
    with (
        CheckedWriter(folder / f"{name}.starts") as starts,
        CheckedWriter(folder / f"{name}.pieces") as pieces,
        bar(
            desc=f"packing documents for {name}",
            total=int((spans[:, 1] - spans[:, 0]).sum()),
            unit=" tokens",
            unit_scale=True,
            disable=None,
            delay=1,
        ) as progress,
    ):
        count = 0
        starts.write(np.zeros(1, "<i8"))
        for sequences in packed(documents, spans, length):
            flat = np.array([piece for sequence in sequences for piece in sequence], "<i8")
            pieces.write(flat)
            starts.write(count + np.cumsum([len(s) for s in sequences]).astype("<i8"))
            count += len(flat)
            progress.update(int(flat[:, 1].sum()))
        return {
            f"{name}.starts": asdict(starts.close()),
            f"{name}.pieces": asdict(pieces.close()),
        }


def _open_index(
    place: Path, key: str, names: list[str], tokens: int
) -> dict[str, tuple[CheckedArray, CheckedArray]]:
    folder = place / key
    advice = f"delete {folder}, it is made again"
    try:
        files = json.loads((folder / INDEX).read_text())["files"]
        sizes = {name: parsed(Written, content) for name, content in files.items()}

        def array(name: str, limit: int) -> CheckedArray:
            array = CheckedArray(inside(place, f"{key}/{name}"), sizes[name], "<i8", limit, advice)
            array.check_size()
            return array

        return {
            name: (
                array(f"{name}.starts", sizes[f"{name}.pieces"].bytes // 16 + 1),
                array(f"{name}.pieces", tokens + 1),
            )
            for name in names
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} cannot be read ({error!r}): {advice}") from error
