"""One piece of a source to one shard: its documents' tokens, and where each document starts.

What a shard holds depends on its piece, the tokenizer and the format alone. Its files are written
in WORK under names of their own and renamed to their places, and its record (what the manifest will
say of it) follows last: a shard with a record is whole, whenever a process was killed, and two
processes that make the same shard at once do not disturb each other.
"""

import contextlib
import json
import secrets
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mst_train.data.checked import CRC, CheckedWriter, crc_bytes
from mst_train.data.documents import Source, digest
from mst_train.data.manifest import (
    FORMAT,
    OFFSETS,
    SHARDS,
    TOKENS,
    WORK,
    ShardEntry,
    parsed,
    write_json,
)
from mst_train.data.pieces import Document, Piece, Reader
from mst_train.data.tokenizer import Vocabulary
from mst_train.errors import UserError

BATCH_CHARACTERS = 4_000_000
"""Documents are tokenised in batches of about this much text."""
BATCH_DOCUMENTS = 65_536
LISTED_PROBLEMS = 100
"""The most problems of a piece whose places are kept; all are counted."""

ENDS = (TOKENS, TOKENS + CRC, OFFSETS, OFFSETS + CRC)
"""How the names of a shard's files end."""

Progress = Callable[[int, int], None]
"""Takes the bytes of the source and the tokens that a batch had."""


@dataclass(frozen=True)
class Task:
    """A piece, the shard that it becomes, and what that is called."""

    number: int
    piece: Piece
    key: str
    """Stands for the piece, its files' state, and how it is read and tokenised."""

    @property
    def name(self) -> str:
        return f"{SHARDS}/{self.number:06}"

    def record(self, folder: Path) -> Path:
        return folder / f"{self.name}.json"


def tasks_of(source: Source, tokenizer: Vocabulary, pieces: list[Piece]) -> list[Task]:
    tasks = []
    for number, piece in enumerate(pieces):
        place = (piece.files, piece.start, piece.stop, piece.state)
        key = digest(FORMAT, source.settings, tokenizer.fingerprint, *place)
        tasks.append(Task(number, piece, key))
    return tasks


@dataclass(frozen=True)
class Record:
    entry: ShardEntry
    problems: tuple[str, ...]
    """The first LISTED_PROBLEMS messages about what was left out."""


def read_record(folder: Path, task: Task, skip_malformed: bool) -> Record | None:
    """The record of a finished shard of this very task; None where there is none.

    Nor is there one where something was left out, unless ``skip_malformed``.
    """
    try:
        content = json.loads(task.record(folder).read_text())
        record = Record(parsed(ShardEntry, content["entry"]), tuple(map(str, content["problems"])))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    usable = record.entry.piece == task.key and (skip_malformed or not record.entry.malformed)
    return record if usable and is_whole(folder, record.entry) else None


def is_whole(folder: Path, entry: ShardEntry) -> bool:
    """Whether a shard's files are there and have their sizes."""
    try:
        return entry.documents == 0 or all(
            (folder / f"{entry.name}{suffix}").stat().st_size == file.bytes
            and (folder / f"{entry.name}{suffix}{CRC}").stat().st_size == crc_bytes(file.bytes)
            for suffix, file in entry.files.items()
        )
    except OSError:
        return False


def make_shard(
    folder: Path,
    reader: Reader,
    tokenizer: Vocabulary,
    skip_malformed: bool,
    task: Task,
    progress: Progress,
) -> None:
    """Tokenise a piece into the files of its shard; a piece without text leaves no files.

    In memory are a batch of text, the longest document (of a long .txt file, a part), and 8 bytes
    for each document of the piece.

    Raises:
        UserError: the piece cannot be read or, unless ``skip_malformed``, something in it holds no
            text.
    """
    problems: list[str] = []
    malformed = 0

    def report(problem: UserError) -> None:
        nonlocal malformed
        if not skip_malformed:
            raise problem
        malformed += 1
        if len(problems) < LISTED_PROBLEMS:
            problems.append(str(problem))

    if read_record(folder, task, skip_malformed) is None:
        task.record(folder).unlink(missing_ok=True)  # that of another piece
    dtype = dtype_of(tokenizer.vocab_size)
    eod = np.array([tokenizer.eod], dtype)
    temporary = folder / WORK / f"{task.number:06}-{secrets.token_hex(8)}"
    offsets = array("q", [0])
    text_bytes = position = 0
    with contextlib.ExitStack() as stack:
        writers = {
            suffix: stack.enter_context(CheckedWriter(temporary.with_name(temporary.name + suffix)))
            for suffix in (TOKENS, OFFSETS)
        }
        continues = False
        for batch in _batches(reader.read(task.piece, report)):
            before = position
            for document, ids in _tokenised(batch, continues, tokenizer, report):
                writers[TOKENS].write(ids.astype(dtype))
                position += len(ids)
                if not document.more:
                    writers[TOKENS].write(eod)
                    position += 1
                    offsets.append(position)
                if isinstance(document.content, str):
                    text_bytes += len(document.content.encode())
            continues = batch[-1].more
            progress(sum(document.size for document in batch), position - before)
        writers[OFFSETS].write(np.array(offsets, "<i8"))
        files = {suffix: writer.close() for suffix, writer in writers.items()}
    for end in ENDS:
        path = temporary.with_name(temporary.name + end)
        if len(offsets) > 1:
            path.replace(folder / (task.name + end))
        else:
            path.unlink()
            (folder / (task.name + end)).unlink(missing_ok=True)
    entry = ShardEntry(
        task.name, task.key, len(offsets) - 1, offsets[-1], text_bytes, malformed, files
    )
    record = Record(entry, tuple(problems))
    write_json(task.record(folder), asdict(record), folder / WORK)


def dtype_of(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents that are not blank, in batches; what blank ones took counts with the next."""
    batch: list[Document] = []
    size = blank = 0
    continues = False
    for document in documents:
        if document.blank and not continues:
            blank += document.size
            continue
        continues = document.more
        batch.append(document._replace(size=document.size + blank))
        size += len(document.content)
        blank = 0
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenised(
    batch: list[Document],
    continues: bool,
    tokenizer: Vocabulary,
    report: Callable[[UserError], None],
) -> Iterator[tuple[Document, NDArray[Any]]]:
    """Each document with its token ids, without end-of-document ids at their end.

    continues: whether the first one goes on with that of an earlier batch.
    """
    texts: list[str] = []
    continuing: set[int] = set()
    for document in batch:
        if isinstance(document.content, str):
            if continues:
                continuing.add(len(texts))
            texts.append(document.content)
        continues = document.more
    encoded = iter(tokenizer.encode_arrays(texts, continuing) if texts else ())
    for document in batch:
        ids = document.content
        if isinstance(ids, str):
            yield document, next(encoded)
        elif 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
            others = np.flatnonzero(ids != tokenizer.eod)
            if len(others):
                yield document, ids[: others[-1] + 1]
        else:
            report(
                UserError(
                    f"data.source holds the token ids {ids.min()} to {ids.max()}, and the "
                    f"vocabulary has {tokenizer.vocab_size}: give the tokenizer that made them"
                )
            )
