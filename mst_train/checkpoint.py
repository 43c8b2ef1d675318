"""Checkpoints: whole or not there.

    checkpoints/
        step_00000050/      model.pt, optimizer.pt, ... : one file per part of the state
            COMPLETE        written last: size and checksum of every file
        latest              the name of the newest checkpoint, for people and scripts

Of several processes each writes what it has of a part: the first one model.pt, the others
model-0001.pt, model-0002.pt and so on, which together are the part. How many there were does not
matter to whoever reads it.

A checkpoint is written into a temporary folder, flushed to disk and renamed; its completion marker
follows, and ``latest`` last. Whatever moment a run is cut off at, the checkpoints that carry a
marker and files of the sizes it lists are whole, and every other folder is ignored. Checksums are
compared when a file is read.

Files are read with ``weights_only``: a checkpoint cannot carry code.
"""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from mst_train.errors import TrainingError, UserError
from mst_train.parallel.together import together
from mst_train.parallel.topology import Topology

MARKER = "COMPLETE"
TEMPORARY = ".writing-"

log = logging.getLogger(__name__)


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], keep: int, processes: Topology | None = None
) -> Path:
    """Write ``state``, one file per key, as the checkpoint of ``step``; keep the newest ``keep``.

    Several ``processes`` each write their own ``state`` into the same checkpoint; a key's values
    are then dicts without common keys. Returns the checkpoint's folder. Raises TrainingError where
    it cannot be written; the checkpoints that are there already are left alone.
    """
    processes = processes or Topology()
    name = f"step_{step:08d}"
    final, temporary = folder / name, folder / f"{TEMPORARY}{name}"
    suffix = f"-{processes.rank:04d}.pt" if processes.rank else ".pt"
    try:
        with together(processes), _writing(final):
            if processes.is_first:
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in (final, *folder.glob(f"{TEMPORARY}*")):
                    shutil.rmtree(leftover, ignore_errors=True)
                temporary.mkdir()
        with together(processes), _writing(final):
            own = {
                f"{key}{suffix}": _write(temporary / f"{key}{suffix}", state[key]) for key in state
            }
        everyones = processes.gather(own)
        with together(processes), _writing(final):
            if processes.is_first:
                files = {file: written for one in everyones for file, written in one.items()}
                temporary.rename(final)
                _replace(
                    final / MARKER, json.dumps({"step": step, "files": files}, indent=1) + "\n"
                )
                _replace(folder / "latest", name + "\n")
    except TrainingError:
        if processes.is_first:
            for leftover in (temporary, *([] if (final / MARKER).exists() else [final])):
                shutil.rmtree(leftover, ignore_errors=True)
        raise
    if processes.is_first:
        for old in complete_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


@contextmanager
def _writing(final: Path) -> Iterator[None]:
    """Have errors say which checkpoint could not be written, and what to do (TrainingError)."""
    try:
        yield
    # The latter is what torch makes of failures of its file writer.
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise TrainingError(
            f"cannot write the checkpoint {final}: {reason}. The ones before it are whole: make "
            f"room or give permission there, and the same command continues"
        ) from error


def complete_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first; warns of those that are not."""
    complete = []
    for path in sorted(folder.glob("step_*")):
        problem = _incomplete(path)
        if problem is None:
            complete.append(path)
        else:
            log.warning("ignoring the checkpoint %s: %s", path, problem)
    return complete


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` names: itself, or the newest of a run's or checkpoints' folder.

    Raises UserError where there is none.
    """
    if (path / MARKER).exists():
        problem = _incomplete(path)
        if problem:
            raise UserError(f"the checkpoint {path} is not whole: {problem}; choose another one")
        return path
    for folder in (path, path / "checkpoints"):
        complete = complete_checkpoints(folder)
        if complete:
            return complete[-1]
    raise UserError(
        f"run.resume={path} is neither auto nor never nor a place with a whole checkpoint: give a "
        f"run's folder, or a folder step_NNNNNNNN that holds a file {MARKER}"
    )


def first_undamaged(checkpoints: list[Path]) -> Path | None:
    """The first of these whose files are what was written; warns of those before it.

    Reads every file of a checkpoint once. Raises UserError where all of them are damaged.
    """
    for checkpoint in checkpoints:
        files = json.loads((checkpoint / MARKER).read_text())["files"]
        damaged = [name for name, w in files.items() if _checksum(checkpoint / name) != w["crc32"]]
        if not damaged:
            return checkpoint
        log.warning("the checkpoint %s is damaged: %s has changed", checkpoint, damaged[0])
    if checkpoints:
        raise UserError(
            f"every checkpoint in {checkpoints[0].parent} is damaged: start anew with another "
            f"run.dir, or from another run's checkpoint with run.resume"
        )
    return None


def load_part(checkpoint: Path, key: str) -> Any:
    """One part of a checkpoint's state, on the CPU. Raises UserError where it cannot be read."""
    part = _load(checkpoint / f"{key}.pt")
    for path in sorted(checkpoint.glob(f"{key}-*.pt")):
        part |= _load(path)
    return part


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # What the reader stumbles over in a file that is none of ours can be anything.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} cannot be read: {reason}") from error


def _incomplete(path: Path) -> str | None:
    """What is missing of a checkpoint; None where it is whole."""
    try:
        files = json.loads((path / MARKER).read_text())["files"]
        sizes = {name: int(written["bytes"]) for name, written in files.items()}
        whole = all(isinstance(written["crc32"], int) for written in files.values()) and sizes
    except FileNotFoundError:
        return f"it has no {MARKER} file, so its writing was cut off"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MARKER} file cannot be read"
    if not whole:
        return f"its {MARKER} file does not list the checkpoint's files"
    for name in sizes:
        if Path(name).name != name or name == "..":
            return f"its {MARKER} file names {name!r}, which is not in its folder"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes where {size} were written"
    return None


class _Checksummed:
    """A file that is only written to, from start to end, and sums up what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.bytes = self.crc32 = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        self.bytes += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _write(path: Path, value: Any) -> dict[str, int]:
    """Write a part to disk; its size and checksum."""
    with path.open("wb") as file:
        summed = _Checksummed(file)
        try:
            torch.save(value, summed)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch's, which does not say what went wrong
            if summed.error is None:
                raise
            raise summed.error from error
        _flush(file)
    return {"bytes": summed.bytes, "crc32": summed.crc32}


def _checksum(path: Path) -> int:
    crc32 = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            crc32 = zlib.crc32(block, crc32)
    return crc32


def _replace(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all, and is on disk on return."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            _flush(file)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
