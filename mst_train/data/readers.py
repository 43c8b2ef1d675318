"""Files to documents: one class for each kind of file that holds many.

Characters are passed on as they are (NUL and carriage returns too); only a byte order mark at the
start of a file is dropped. A line or row without text is reported with its place; a file that
cannot be read at all is a ``UserError``.
"""

import codecs
import io
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

from mst_train.data.pieces import Document, Report, between_words, ranges
from mst_train.errors import UserError, reason_of

PARQUET_ROWS = 256
"""Rows of a .parquet file in memory at a time."""
READ_BYTES = 1 << 20
TEXT_PART_BYTES = 1 << 24
COMPRESSED_PIECES = 16
"""A compressed file is read from its start for every piece of it, so it has few."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
PARQUET = ".parquet"


class FileReader(Protocol):
    """Reads one kind of file, by ranges of what it counts."""

    def measure(self, path: Path) -> int:
        """About how many bytes of text the file holds."""
        ...

    def divide(self, path: Path, size: int, target: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, size) of ranges of about ``target`` bytes; ``size``: of the file."""
        ...

    def read(self, path: Path, start: int, stop: int, report: Report) -> Iterator[Document]:
        """The documents that begin in the range."""
        ...


def read_text(path: Path, report: Report, errors: str = "strict") -> Iterator[Document]:
    """The text of a file, in parts of about TEXT_PART_BYTES where it is longer.

    ``errors``: what becomes of bytes that are not UTF-8, as in ``bytes.decode``.
    """
    encoding = "utf-8-sig" if errors == "strict" else "utf-8"
    parts: Iterable[Document]
    try:
        if path.stat().st_size <= TEXT_PART_BYTES:
            raw = path.read_bytes()
            parts = [Document(raw.decode(encoding, errors), len(raw))]
        else:
            # What was passed on cannot be taken back, so the whole file is decoded once before.
            deque(_text_parts(path, encoding, errors), maxlen=0)
            parts = _text_parts(path, encoding, errors)
    except UnicodeDecodeError as error:
        report(not_utf8(path, error))
    else:
        yield from parts


def _text_parts(path: Path, encoding: str, errors: str) -> Iterator[Document]:
    """Parts that end between words, where there are some."""
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    rest = ""
    with path.open("rb") as file:
        while raw := file.read(TEXT_PART_BYTES):
            text = rest + decoder.decode(raw)
            end = between_words(text, 0, len(text))
            text, rest = text[:end], text[end:]
            yield Document(text, len(raw), more=True)
    yield Document(rest + decoder.decode(b"", final=True), 0)


@dataclass(frozen=True)
class JsonLines:
    """A line is a document, its text in the field ``text_field``. Ranges are of bytes.

    Blank lines and null texts are skipped. A compressed file is measured by reading it once.
    """

    text_field: str

    def measure(self, path: Path) -> int:
        if path.suffix.lower() not in COMPRESSIONS:
            return path.stat().st_size
        with self._open(path) as file:
            return sum(map(len, _blocks(file)))

    def divide(self, path: Path, size: int, target: int) -> Iterator[tuple[int, int, int]]:
        if path.suffix.lower() in COMPRESSIONS:
            target = max(target, size // COMPRESSED_PIECES)
        for start, stop in ranges(size, max(1, round(size / target))):
            yield start, stop, stop - start

    def read(self, path: Path, start: int, stop: int, report: Report) -> Iterator[Document]:
        lines_before = None
        for number, raw in enumerate(self._lines(path, start, stop), 1):
            try:
                text = self._text(raw, "utf-8-sig" if start == 0 and number == 1 else "utf-8")
            except UserError as problem:
                if lines_before is None:
                    lines_before = self._lines_before(path, start)
                report(UserError(f"{path}:{lines_before + number}{problem}"))
                continue
            if text is not None:
                yield Document(text, len(raw))

    def _text(self, raw: bytes, encoding: str) -> str | None:
        """The text of a line; None where it is blank, or its text null.

        Raises UserError with what to say after the line's place.
        """
        try:
            line = raw.decode(encoding)
        except UnicodeDecodeError as error:
            raise not_utf8("", error) from error
        if not line or line.isspace():
            return None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f" is not JSON ({error}): correct the line or remove it") from error
        if not isinstance(row, dict):
            raise UserError(
                f" is a JSON {type(row).__name__}, not an object with a field "
                f"data.text_field={self.text_field}: correct the line or remove it"
            )
        if self.text_field not in row:
            raise missing_field("", self.text_field, list(row))
        return text_of(row[self.text_field], self.text_field)

    def _lines(self, path: Path, start: int, stop: int) -> Iterator[bytes]:
        """The lines whose first byte is in the range."""
        with self._open(path) as file:
            position = start
            if start:
                if file.seekable():
                    file.seek(start - 1)
                else:
                    deque(_blocks(file, start - 1), maxlen=0)
                position += len(file.readline()) - 1
            while position < stop and (line := file.readline()):
                position += len(line)
                yield line

    def _lines_before(self, path: Path, start: int) -> int:
        """How many lines begin before ``start``."""
        lines, last = 0, b"\n"
        with self._open(path) as file:
            for block in _blocks(file, start):
                lines += block.count(b"\n")
                last = block[-1:]
        return lines + (last != b"\n")

    def _open(self, path: Path) -> IO[bytes]:
        compression = COMPRESSIONS.get(path.suffix.lower())
        if compression is None:
            return path.open("rb")
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), compression)
        return cast(IO[bytes], io.BufferedReader(stream, READ_BYTES))


def _blocks(file: IO[bytes], count: int = sys.maxsize) -> Iterator[bytes]:
    """The next ``count`` bytes of a file, or all, READ_BYTES at a time."""
    while block := file.read(min(READ_BYTES, count)):
        count -= len(block)
        yield block


@dataclass(frozen=True)
class Parquet:
    """A row is a document, its text in the column ``text_field``. Ranges are of row groups.

    Null texts are skipped. PARQUET_ROWS are in memory at a time.
    """

    text_field: str

    def measure(self, path: Path) -> int:
        with self._open(path) as file:
            groups = range(file.metadata.num_row_groups)
            return sum(self._group_size(file, group) for group in groups)

    def divide(self, path: Path, size: int, target: int) -> Iterator[tuple[int, int, int]]:
        with self._open(path) as file:
            start = size = 0
            for group in range(file.metadata.num_row_groups):
                if group > start and size + self._group_size(file, group) > target:
                    yield start, group, size
                    start, size = group, 0
                size += self._group_size(file, group)
            if file.metadata.num_row_groups > start:
                yield start, file.metadata.num_row_groups, size

    def read(self, path: Path, start: int, stop: int, report: Report) -> Iterator[Document]:
        import pyarrow

        with self._open(path) as file:
            row = sum(file.metadata.row_group(group).num_rows for group in range(start))
            batches = file.iter_batches(
                batch_size=PARQUET_ROWS,
                row_groups=list(range(start, stop)),
                columns=[self.text_field],
                use_threads=False,
            )
            try:
                for batch in batches:
                    texts = batch.column(0).to_pylist()
                    yield from documents_of(texts, self.text_field, f"{path}", row, report)
                    row += len(texts)
            except (pyarrow.ArrowException, UnicodeDecodeError) as error:
                raise self._broken(path, error) from error

    def _open(self, path: Path) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            # A buffer has the columns read in parts rather than whole row groups at once.
            file = pyarrow.parquet.ParquetFile(path, buffer_size=READ_BYTES)
        except pyarrow.ArrowException as error:
            raise self._broken(path, error) from error
        if self.text_field not in file.schema_arrow.names:
            names = file.schema_arrow.names
            file.close()
            raise missing_field(str(path), self.text_field, names)
        return file

    def _group_size(self, file: Any, group: int) -> int:
        metadata = file.metadata.row_group(group)
        columns = (metadata.column(index) for index in range(metadata.num_columns))
        return sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema.partition(".")[0] == self.text_field
        )

    def _broken(self, path: Path, error: Exception) -> UserError:
        return UserError(
            f"{path} cannot be read as .parquet ({reason_of(error)}): replace it or take it out of "
            f"data.source"
        )


def missing_field(where: str, text_field: str, fields: list[str]) -> UserError:
    return UserError(
        f"{where} has no field data.text_field={text_field}: set data.text_field to one of "
        f"{', '.join(fields) or '(it has no fields)'}"
    )


def documents_of(
    texts: Iterable[Any], text_field: str, place: str, rows_before: int, report: Report
) -> Iterator[Document]:
    """The documents in a column's values, which follow ``rows_before`` rows of ``place``."""
    for row, text in enumerate(texts, rows_before + 1):
        try:
            found = text_of(text, text_field)
        except UserError as problem:
            report(UserError(f"{place}, row {row}{problem}"))
            continue
        if found is not None:
            yield Document(found, len(found))


def text_of(value: object, text_field: str) -> str | None:
    """A row's text, or null. Raises UserError with what to say after the row's place."""
    if value is not None and not isinstance(value, str):
        raise UserError(
            f": data.text_field={text_field} is of type {type(value).__name__}, not text: name a "
            f"field of text or correct the row"
        )
    try:
        if value is not None:
            value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f": data.text_field={text_field} holds half a surrogate pair, which is not text "
            f"({error}): correct the row or remove it"
        ) from error
    return value


def not_utf8(where: object, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{where} is not UTF-8 ({error}): convert it to UTF-8 or take it out of data.source"
    )
