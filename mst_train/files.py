"""Files and folders that are whole or not there, and errors that name them."""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mst_train.errors import TrainingError, UserError

UNFINISHED = ".writing-"
"""How the names of folders begin that are being written or deleted."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have errors of the file system name the file and say what to do (TrainingError)."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written ({error.strerror or error}): make room or give permission "
            f"there, and the same command continues from the last checkpoint"
        ) from error


@contextlib.contextmanager
def reading(what: object, advice: str) -> Iterator[None]:
    """Have errors of the file system say what cannot be read and what to do (UserError)."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be read ({error.strerror or error}): {advice}") from error


def unwritable(message: str, error: Exception) -> UserError | TrainingError:
    """What becomes of an error in writing: a full disk may have room for the same command later
    (TrainingError), whatever else is wrong is the user's to change (UserError)."""
    if isinstance(error, OSError) and error.errno not in FULL:
        return UserError(message)
    return TrainingError(message)


@contextlib.contextmanager
def writing_to(setting: str, advice: str) -> Iterator[None]:
    """Have errors of the file system be about a folder that a setting names, and say what to do
    (as ``unwritable`` sorts them)."""
    try:
        yield
    except OSError as error:
        message = f"{setting} cannot be written ({error.strerror or error}): {advice}"
        raise unwritable(message, error) from error


def make_folder(folder: Path, key: str) -> None:
    """Have the folder that a setting names, before the work whose result goes there."""
    with writing_to(f"{key}={folder}", "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)


def is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at ``path``, and has not been removed or replaced."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def replace_file(path: Path, content: bytes, work: Path | None = None) -> None:
    """Write a file so that it is there whole or not at all, and is on disk on return (OSError).

    work: a folder of the same file system to write it in, by several processes at once; None: its
        own, by one.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    if work is not None:
        temporary = work / f"{path.name}-{secrets.token_hex(8)}"
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    to_disk(path.parent)


def replace_text(path: Path, text: str) -> None:
    """``replace_file`` with a text."""
    replace_file(path, text.encode())


def remove_folder(folder: Path) -> None:
    """Delete a folder so that it is there whole or not at all, whoever writes to it or is killed.

    Where this is cut off, ``remove_unfinished`` does the rest.
    """
    removed = folder.with_name(
        f"{UNFINISHED}{folder.name.removeprefix(UNFINISHED)}-{secrets.token_hex(4)}"
    )
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def remove_unfinished(folder: Path, names: str = ".*") -> None:
    """Delete what a killed process was writing or deleting in ``folder``.

    names: a regular expression for what follows ``UNFINISHED``.
    """
    for leftover in folder.glob(f"{UNFINISHED}*"):
        if re.fullmatch(names, leftover.name.removeprefix(UNFINISHED)):
            with contextlib.suppress(OSError):  # gone, or not ours to delete
                remove_folder(leftover)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def expanded(path: str | Path) -> Path:
    """The path, with ``~`` and ``~NAME`` at its beginning as the home folders that they mean.

    Raises UserError where there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such home folder: write the whole path") from error


def name_of(path: str) -> str:
    """What a path is called, in characters that every file system has: its last part that is no
    pattern; empty where there is none."""
    parts = [part for part in Path(path).absolute().parts[1:] if not set(part) & set("*?[")]
    return re.sub(r"[^\w.+-]+", "-", parts[-1], flags=re.ASCII).strip("-.") if parts else ""


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a small file so that it is there whole or not at all.

    Raises TrainingError where it cannot be written.
    """
    with writing(path):
        replace_text(path, json.dumps(value, indent=2) + "\n")
