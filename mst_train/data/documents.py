"""Where the text comes from: ``data.source`` to a fingerprint and an ordered stream of documents.

A source is read more than once (for the tokenizer's sample, then for the tokens) and gives the same
documents in the same order every time. Blank documents are skipped.
"""

import functools
import glob
import hashlib
import json
import math
import os
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from mst_train.config import DataConfig
from mst_train.data.huggingface import HuggingFaceRows
from mst_train.data.megatron import SUFFIX as MEGATRON
from mst_train.data.megatron import MegatronTokens
from mst_train.data.pieces import Document, Piece, Reader, Report, cores, refuse
from mst_train.data.readers import (
    JSON_LINES,
    PARQUET,
    FileReader,
    JsonLines,
    Parquet,
    read_text,
)
from mst_train.errors import UserError
from mst_train.files import expanded, reading
from mst_train.rendezvous.dist_env import world_size

STDLIB = "stdlib"
DIVIDED = (*JSON_LINES, PARQUET, MEGATRON)
"""How the names of files end that hold many documents."""
SAVED_TO_DISK = {"dataset_dict.json": '["train"]', "dataset_info.json": ""}
"""Files of a data set that datasets has saved; which part of it is meant, where it has several."""
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "__pycache__"}

UNREADABLE = "make it readable or take it out of data.source"

SMALLEST_PIECE = 1 << 20
PIECES = 64
"""A source is divided into about this many pieces or more, where they are not smaller than
SMALLEST_PIECE then."""
SAMPLED_BYTES = 1 << 30
"""A tokenizer is trained on a sample of about this much of the source or less."""
REPOSITORY_CHARACTERS = 1 << 26
"""A repository with more text is several documents."""


@dataclass(frozen=True)
class Source:
    name: str
    """``data.source``, for messages."""
    fingerprint: str
    """Changes when the text may have changed. Files: of their relative paths, sizes and times of
    modification (and of the settings that decide how they are read). Data sets: of what
    ``datasets`` says."""
    settings: str
    """Stands for the settings that decide how the source is read."""
    reader: Reader
    divide: Callable[[int], list[Piece]]
    """Pieces of about so many bytes at most, where the source can be divided so."""

    def documents(self, report: Report = refuse, limit: float = math.inf) -> Iterator[str]:
        """Every document that is not blank, in the source's order.

        limit: where the source has more bytes, documents from all over it, of about so many.

        Raises:
            UserError: a file, line or row cannot be used, or there is no text at all.
        """
        empty = True
        pieces = self.divide(1 << 28)
        size_is_known = all(piece.size or piece.files for piece in pieces)
        if size_is_known and sum(piece.size for piece in pieces) <= limit:
            limit = math.inf
        for piece in pieces:
            size = 0
            for document in self.reader.read(piece, report):
                if not isinstance(document.content, str):
                    raise UserError(
                        f"data.source={self.name} holds tokens and no text to train a tokenizer "
                        f"on: give the one that made them as data.tokenizer (or, to prepare them, "
                        f"prepare.vocab_size and prepare.end_of_document)"
                    )
                if not document.blank:
                    empty = False
                    yield document.content
                size += document.size
                if size > limit / len(pieces):
                    break
        if empty:
            raise no_text_at_all(self.name)


def find_documents(data: DataConfig) -> Source:
    """The source that ``data.source`` names; no document is read yet.

    Raises:
        UserError: nothing usable is there.
    """
    if data.source == STDLIB:
        return _stdlib()
    try:
        if _looks_like_a_path(data):
            return _files(data)
    except (OSError, RuntimeError) as error:
        raise _cannot_be_looked_up(data, error) from error
    rows = HuggingFaceRows.load(data)
    return Source(
        name=data.source,
        fingerprint=digest("huggingface", rows.fingerprint, data.text_field),
        settings=digest("huggingface", data.text_field),
        reader=rows,
        divide=rows.divide,
    )


def check_source(data: DataConfig) -> None:
    """Raises UserError where ``data.source`` is a path that leads to nothing that can be read, or
    the name of no data set.

    Files are looked at up to the first that can be read, and none is opened.
    """
    if data.source == STDLIB:
        return
    try:
        if not _looks_like_a_path(data):
            if world_size() == 1:  # many processes would ask at once
                HuggingFaceRows.check_name(data.source)
            return
        _, names = _usable_files(data)
        if next(names, None) is None:
            raise _nothing_to_read(data)
    except (OSError, RuntimeError) as error:
        raise _cannot_be_looked_up(data, error) from error


def digest(*parts: object) -> str:
    """32 hexadecimal digits that stand for ``parts`` (whatever ``json`` can write)."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def no_text_at_all(name: str) -> UserError:
    return UserError(
        f"data.source={name} holds no text (every document is blank): name a source with text, or "
        f"another data.text_field"
    )


@dataclass(frozen=True)
class Files:
    """Reads the files of a folder."""

    root: Path
    text_field: str
    text_suffixes: tuple[str, ...]
    repository_depth: int | None = None
    """Text files that have so many folders in common, from the root on, are one document; None:
    each file is one."""
    errors: str = "strict"
    """As ``read_text`` takes it."""

    def read(self, piece: Piece, report: Report) -> Iterator[Document]:
        first = self.root / piece.files[0]
        if state_of(self.root, piece.files) != piece.state:
            raise UserError(
                f"{first}{' and others' * (len(piece.files) > 1)} changed while data.source was "
                f"read: start again when nothing writes to it any more"
            )
        reader = self.reader_of(piece.files[0])
        if reader is not None:
            with reading(first, UNREADABLE):
                yield from reader.read(first, piece.start, piece.stop, report)
        elif self.repository_depth is not None:
            for _, files in groupby(piece.files, self._repository_of):
                yield from self._repository(list(files), report)
        else:
            for name in piece.files:
                yield from self._text(name, report)

    def reader_of(self, name: str) -> FileReader | None:
        """What reads a file that is divided; None for one that is text as a whole."""
        name = name.lower()
        if name.endswith(self.text_suffixes):
            return None
        if name.endswith(JSON_LINES):
            return JsonLines(self.text_field)
        if name.endswith(PARQUET):
            return Parquet(self.text_field)
        return MegatronTokens()

    def belong(self, name: str, other: str) -> bool:
        """Whether two files are parts of one document."""
        repository = self._repository_of
        return self.repository_depth is not None and repository(name) == repository(other)

    def usable(self, name: str) -> bool:
        return name.lower().endswith((*self.text_suffixes, *DIVIDED))

    def _text(self, name: str, report: Report) -> Iterator[Document]:
        with reading(self.root / name, UNREADABLE):
            yield from read_text(self.root / name, report, self.errors)

    def _repository_of(self, name: str) -> list[str]:
        return name.split("/")[: self.repository_depth]

    def _repository(self, names: list[str], report: Report) -> Iterator[Document]:
        """The files of a repository as one document, or several where that would be very long."""
        parts: list[str] = []
        size = characters = 0
        for name in names:
            header = f"=== {name.encode(errors='replace').decode()} ===\n"
            for part in self._text(name, report):
                text = part.content
                assert isinstance(text, str)
                if not text or text.isspace():
                    continue
                if parts and characters + len(text) > REPOSITORY_CHARACTERS:
                    yield Document("".join(parts), size)
                    parts, size, characters = [], 0, 0
                parts += [header, text, "" if part.more or text.endswith("\n") else "\n"]
                size += part.size
                characters += len(text)
                header = ""
        yield Document("".join(parts), size)


def state_of(root: Path, names: tuple[str, ...]) -> str:
    """Stands for the sizes and times of modification of files."""
    found = [_status(root / name) for name in names]
    return digest([(status.st_size, status.st_mtime_ns) for status in found])


def _status(path: Path) -> os.stat_result:
    with reading(path, UNREADABLE):
        return path.stat()


def _stdlib() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    names = [
        name
        for name in (_walk(root) if root.is_dir() else ())
        if name.endswith(".py") and not STDLIB_EXCLUDED.intersection(name.split("/"))
    ]
    if not names:
        raise UserError(
            f"data.source={STDLIB}: this Python keeps no source files in {root}: name a folder of "
            f"text instead"
        )
    # Python tests its handling of broken encodings on files of its own.
    return _source(STDLIB, Files(root, "", (".py",), errors="replace"), names, STDLIB)


def _files(data: DataConfig) -> Source:
    files, found = _usable_files(data)
    names = list(found)
    if not names:
        raise _nothing_to_read(data)
    settings = (data.text_field, files.text_suffixes, files.repository_depth)
    return _source(data.source, files, names, "files", *settings)


def _usable_files(data: DataConfig) -> tuple[Files, Iterator[str]]:
    """What reads the files that ``data.source`` leads to, and their names."""
    suffixes = tuple(suffix.lower() for suffix in data.text_suffixes)
    root, found = _found_files(data.source)
    depth = None
    if data.documents == "repository":
        depth = 0 if (root / ".git").exists() else 1  # one checkout, or a folder of them
    files = Files(root, data.text_field, suffixes, depth)
    return files, filter(files.usable, found)


def _nothing_to_read(data: DataConfig) -> UserError:
    root, _ = _found_files(data.source)
    split = next((part for name, part in SAVED_TO_DISK.items() if (root / name).is_file()), None)
    if split is not None:
        return UserError(
            f"data.source={data.source} is what datasets' save_to_disk writes, which is not read: "
            f"make .parquet of it, in Python by "
            f'datasets.load_from_disk("{data.source}"){split}.to_parquet("texts.parquet")'
        )
    suffixes = (suffix.lower() for suffix in data.text_suffixes)
    known = ", ".join((*suffixes, *JSON_LINES[:3], PARQUET, MEGATRON))
    return UserError(
        f"data.source={data.source} has no file that can be read: it must hold or be {known} "
        f"files (data.text_suffixes adds others that are text)"
    )


def _cannot_be_looked_up(data: DataConfig, error: Exception) -> UserError:
    return UserError(f"data.source={data.source} cannot be looked up ({error}): correct the path")


def _source(name: str, files: Files, names: list[str], *settings: object) -> Source:
    names = sorted(names)
    states = []
    for file in names:
        status = _status(files.root / file)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(
                f"{files.root / file} is a pipe, a device or a socket, which cannot be read twice: "
                f"put a file there, or take it out of data.source"
            )
        states.append((file, status.st_size, status.st_mtime_ns))

    @functools.cache
    def sizes() -> list[int]:
        return _measured(files, names, [size for _, size, _ in states])

    return Source(
        name=name,
        fingerprint=digest(*settings, states),
        settings=digest(*settings),
        reader=files,
        divide=lambda limit: _divide(files, names, sizes(), limit),
    )


def _measured(files: Files, names: list[str], on_disk: list[int]) -> list[int]:
    """About how many bytes of text each file holds."""

    def measure(name: str, size: int) -> int:
        reader = files.reader_of(name)
        with reading(files.root / name, UNREADABLE):
            return size if reader is None else reader.measure(files.root / name)

    # Compressed files are read to be measured; their decompression leaves other threads free.
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(measure, names, on_disk))


def _divide(files: Files, names: list[str], sizes: list[int], limit: int) -> list[Piece]:
    """Pieces of about ``limit`` bytes: neighbouring text files together, other files divided."""
    target = max(SMALLEST_PIECE, min(limit, sum(sizes) // PIECES))
    pieces: list[Piece] = []
    together: list[str] = []
    size = 0

    def end_piece() -> None:
        nonlocal size
        if together:
            pieces.append(Piece(tuple(together), 0, 0, size, state_of(files.root, tuple(together))))
            together.clear()
            size = 0

    for name, file_size in zip(names, sizes, strict=True):
        reader = files.reader_of(name)
        if reader is not None:
            end_piece()
            state = state_of(files.root, (name,))
            parts = reader.divide(files.root / name, file_size, target)
            pieces += [Piece((name,), start, stop, part, state) for start, stop, part in parts]
            continue
        if size + file_size > target and not (together and files.belong(together[-1], name)):
            end_piece()
        together.append(name)
        size += file_size
    end_piece()
    return pieces


def _looks_like_a_path(data: DataConfig) -> bool:
    source = data.source
    return (
        source.startswith(("/", ".", "~"))
        or any(character in source for character in "*?[")
        or source.lower().endswith((*data.text_suffixes, *DIVIDED))
        or Path(source).exists()
        or Path(source + MEGATRON).exists()
    )


def _found_files(source: str) -> tuple[Path, Iterable[str]]:
    """The folder that a path or glob leads to, and its files, relative to it."""
    path = expanded(source)
    if path.is_dir():
        return path, _walk(path)
    if path.exists():
        # Megatron's pair of files goes by the name of either, or of both without a suffix.
        return path.parent, [
            path.with_suffix(MEGATRON).name if path.suffix == ".bin" else path.name
        ]
    if Path(f"{path}{MEGATRON}").exists():
        return path.parent, [f"{path.name}{MEGATRON}"]
    matches = (Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 - absolute patterns
    found = [match for match in matches if not match.is_dir()]
    if not found:
        raise UserError(
            f"data.source={source} matches no file or folder: correct the path (relative ones "
            f"start from {Path.cwd()})"
        )
    root = Path(os.path.commonpath([match.parent for match in found]))
    return root, [match.relative_to(root).as_posix() for match in found]


def _walk(root: Path) -> Iterator[str]:
    """Every file in a folder and the folders below it, relative to it."""

    def refuse_folder(error: OSError) -> None:
        with reading(error.filename, UNREADABLE):
            raise error

    for folder, _, names in os.walk(root, onerror=refuse_folder):
        for name in names:
            yield Path(folder, name).relative_to(root).as_posix()
