"""Files to documents: one function per suffix.

Every function takes a path and the name of the text field and yields the file's documents in order.
Characters are passed on as they are (NUL and carriage returns too); only a byte order mark at the
start of a file is dropped. What cannot be read is a ``UserError`` that gives the file and the line
or row.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from mst_train.errors import UserError

PARQUET_ROWS = 256
"""Rows of a .parquet file in memory at a time."""


def read_file(path: Path, text_field: str) -> Iterator[str]:
    """The documents of a .txt, .jsonl or .parquet file."""
    try:
        yield from READERS[path.suffix.lower()](path, text_field)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be read ({error.strerror or error}): make it readable or take it out of "
        f"data.source"
    )


def read_txt(path: Path, text_field: str) -> Iterator[str]:
    """A file is a document; it is held in memory as a whole."""
    yield _decode(path.read_bytes(), path)


def read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    """A line is a document; blank lines and null texts are skipped."""
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            line = _decode(raw, f"{path}:{number}")
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}:{number} is not JSON ({error}): correct the line or remove it"
                ) from error
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}:{number} is a JSON {type(row).__name__}, not an object with a field "
                    f"data.text_field={text_field}: correct the line or remove it"
                )
            if text_field not in row:
                raise missing_field(f"{path}:{number}", text_field, list(row))
            yield from text_of(row[text_field], f"{path}:{number}", text_field)


def read_parquet(path: Path, text_field: str) -> Iterator[str]:
    """A row is a document; null texts are skipped. Rows are read in batches of PARQUET_ROWS."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise missing_field(str(path), text_field, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield from text_of(text, f"{path}, row {row}", text_field)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as .parquet ({_first_line(error)}): replace it or take it out "
            f"of data.source"
        ) from error


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def missing_field(where: str, text_field: str, fields: list[str]) -> UserError:
    return UserError(
        f"{where} has no field data.text_field={text_field}: set data.text_field to one of "
        f"{', '.join(fields) or '(it has no fields)'}"
    )


def text_of(value: object, where: str, text_field: str) -> Iterator[str]:
    """The document in a row's text field: none where the field is null."""
    if value is None:
        return
    if not isinstance(value, str):
        raise UserError(
            f"{where}: data.text_field={text_field} holds a {type(value).__name__}, not text: "
            f"name a field of text or correct the row"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: data.text_field={text_field} holds half a surrogate pair, which is not "
            f"text ({error}): correct the row or remove it"
        ) from error
    yield value


def _decode(raw: bytes, where: object) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 ({error}): convert it to UTF-8 or take it out of data.source"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
