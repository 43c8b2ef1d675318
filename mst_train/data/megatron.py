"""Megatron's token files: ``X.idx`` beside ``X.bin``.

The index is: ``MMIDIDX`` and two zero bytes; uint64 version (1); uint8 code of the tokens' type;
uint64 sequences; uint64 document borders; int32 [sequences] lengths in tokens; int64 [sequences]
places in ``X.bin`` in bytes; int64 [borders] the number of the sequence each document starts with,
and the end. All are little-endian. Multimodal files have another byte for each sequence, which is
not read.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mst_train.data.pieces import Document, Report
from mst_train.errors import UserError
from mst_train.files import reading

SUFFIX = ".idx"
_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class _Index(NamedTuple):
    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    places: NDArray[np.int64]
    borders: NDArray[np.int64]


class MegatronTokens:
    """A document is the sequences between two borders. Ranges are of documents."""

    def measure(self, path: Path) -> int:
        return _open(path)[1].size * _open(path)[0].dtype.itemsize

    def divide(self, path: Path, size: int, target: int) -> Iterator[tuple[int, int, int]]:
        index, _ = _open(path)
        ends = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])[index.borders]
        ends *= index.dtype.itemsize  # [documents + 1]: bytes before each document
        start = 0
        while start < len(ends) - 1:
            stop = int(np.searchsorted(ends, ends[start] + target, side="right")) - 1
            stop = max(stop, start + 1)
            yield start, stop, int(ends[stop] - ends[start])
            start = stop

    def read(self, path: Path, start: int, stop: int, report: Report) -> Iterator[Document]:
        index, tokens = _open(path)
        for document in range(start, stop):
            sequences = range(int(index.borders[document]), int(index.borders[document + 1]))
            parts = []
            for sequence in sequences:
                place = int(index.places[sequence]) // index.dtype.itemsize
                parts.append(tokens[place : place + int(index.lengths[sequence])])
            content = np.concatenate(parts) if parts else tokens[:0]
            yield Document(content, content.nbytes)


def _open(path: Path) -> tuple[_Index, NDArray[Any]]:
    """The index, memory-mapped, and the tokens; ``UserError`` where they are not such files."""
    with path.open("rb") as file:
        raw = file.read(_HEADER.size)
    if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
        raise _refused(path, "it does not begin as Megatron's index files do")
    _, version, code, sequences, borders = _HEADER.unpack(raw)
    if version != 1 or code not in _DTYPES:
        raise _refused(path, f"version {version} and type {code} are not known")
    if path.stat().st_size < _HEADER.size + 12 * sequences + 8 * borders:
        raise _refused(path, f"it is too short for {sequences} sequences and {borders} borders")
    place = _HEADER.size
    arrays = []
    for count, dtype in ((sequences, "<i4"), (sequences, "<i8"), (borders, "<i8")):
        array = np.memmap(path, dtype, "r", place, (count,)) if count else np.empty(0, dtype)
        arrays.append(array)
        place += array.nbytes
    index = _Index(np.dtype(_DTYPES[code]), *arrays)
    if sequences and (index.lengths.min() < 0 or index.places.min() < 0):
        raise _refused(path, "a length or a place in it is negative")
    if borders and not (
        index.borders[0] >= 0
        and index.borders[-1] <= sequences
        and (np.diff(index.borders) >= 0).all()
    ):
        raise _refused(path, "the documents in it do not follow each other")
    return index, _tokens(path, index)


def _tokens(path: Path, index: _Index) -> NDArray[Any]:
    binary = path.with_suffix(".bin")
    width = index.dtype.itemsize
    needed = int((index.places + width * index.lengths.astype(np.int64)).max(initial=0))
    with reading(binary, f"{path} is the index of that file, put it beside"):
        size = binary.stat().st_size
    if size < needed or (index.places % width).any():
        raise _refused(path, f"{binary} has {size} bytes, which it does not fit")
    return np.memmap(binary, index.dtype, "r") if needed else np.empty(0, index.dtype)


def _refused(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} cannot be read as the index of a Megatron token file ({reason}): replace it or "
        f"take it out of data.source"
    )
