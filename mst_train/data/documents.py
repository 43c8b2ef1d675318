"""Where the text comes from: ``data.source`` to a fingerprint and an ordered stream of documents.

A source is read more than once (for the tokenizer's sample, then for the tokens) and gives the same
documents in the same order every time. Blank documents are skipped.
"""

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mst_train.config import DataConfig
from mst_train.data.huggingface import HuggingFaceDataset
from mst_train.data.readers import READERS, read_file, unreadable
from mst_train.errors import UserError

STDLIB = "stdlib"
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "__pycache__"}
SUFFIXES = tuple(READERS)


@dataclass(frozen=True)
class Source:
    name: str
    """``data.source``, for messages."""
    fingerprint: str
    """Changes when the text may have changed. Files: of their relative paths, sizes and times of
    modification (and of ``data.text_field``). Data sets: of what ``datasets`` says."""
    count: int | None
    """The number of documents, blank ones included, where it is known without reading them."""
    read: Callable[[], Iterator[str]]

    def documents(self) -> Iterator[str]:
        """Every document that is not blank, in the source's order.

        Raises:
            UserError: a file, line or row cannot be used, or there is no document at all.
        """
        empty = True
        for document in self.read():
            if document and not document.isspace():
                empty = False
                yield document
        if empty:
            raise UserError(
                f"data.source={self.name} holds no text (every document is blank): name a source "
                f"with text, or another data.text_field"
            )


def find_documents(data: DataConfig) -> Source:
    """The source that ``data.source`` names; no document is read yet.

    Raises:
        UserError: nothing usable is there.
    """
    if data.source == STDLIB:
        return _stdlib()
    try:
        if _looks_like_a_path(data.source):
            return _files(data)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"data.source={data.source} cannot be looked up ({error}): correct the path"
        ) from error
    rows = HuggingFaceDataset(data)
    return Source(
        name=data.source,
        fingerprint=digest("huggingface", rows.fingerprint, data.text_field),
        count=len(rows),
        read=rows.__iter__,
    )


def digest(*parts: object) -> str:
    """32 hexadecimal digits that stand for ``parts`` (whatever ``json`` can write)."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _stdlib() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        file
        for file in (_walk(root) if root.is_dir() else ())
        if file.suffix == ".py" and not STDLIB_EXCLUDED.intersection(file.relative_to(root).parts)
    ]
    if not files:
        raise UserError(
            f"data.source={STDLIB}: this Python keeps no source files in {root}: name a folder of "
            f"text instead"
        )
    files = _sorted(files, root)

    def read() -> Iterator[str]:
        for file in files:
            try:
                # Python tests its handling of broken encodings on files of its own.
                yield file.read_bytes().decode(errors="replace")
            except OSError as error:
                raise unreadable(file, error) from error

    return Source(STDLIB, digest(STDLIB, _state(files, root)), len(files), read)


def _files(data: DataConfig) -> Source:
    root, files = _usable_files(data.source)
    files = _sorted(files, root)

    def read() -> Iterator[str]:
        for file in files:
            yield from read_file(file, data.text_field)

    return Source(
        name=data.source,
        fingerprint=digest("files", data.text_field, _state(files, root)),
        count=len(files) if all(file.suffix.lower() == ".txt" for file in files) else None,
        read=read,
    )


def _looks_like_a_path(source: str) -> bool:
    return (
        source.startswith(("/", ".", "~"))
        or any(character in source for character in "*?[")
        or source.lower().endswith(SUFFIXES)
        or Path(source).exists()
    )


def _usable_files(source: str) -> tuple[Path, list[Path]]:
    """The folder that a path or glob leads to, and its files with a suffix that has a reader."""
    path = Path(source).expanduser()
    known = ", ".join(SUFFIXES)
    if path.is_dir():
        root, found = path, list(_walk(path))
    elif path.exists():
        root, found = path.parent, [path]
    else:
        matches = (Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 - absolute patterns
        found = [match for match in matches if not match.is_dir()]
        if not found:
            raise UserError(
                f"data.source={source} matches no file or folder: correct the path (relative ones "
                f"start from {Path.cwd()})"
            )
        root = Path(os.path.commonpath([match.parent for match in found]))
    usable = [file for file in found if file.suffix.lower() in READERS]
    if not usable:
        raise UserError(
            f"data.source={source} has no file that can be read: it must hold or be {known} files"
        )
    return root, usable


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename), error) from error

    for folder, _, names in os.walk(root, onerror=refuse):
        for name in names:
            yield Path(folder, name)


def _sorted(files: list[Path], root: Path) -> list[Path]:
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _state(files: list[Path], root: Path) -> list[tuple[str, int, int]]:
    """(relative path, bytes, time of modification in ns) of each file."""
    state = []
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise unreadable(file, error) from error
        state.append((file.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns))
    return state
