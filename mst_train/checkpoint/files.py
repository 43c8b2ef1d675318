"""Checkpoints: whole or not there.

    checkpoints/
        step_00000050/      model.pt, optimizer.pt, ... : one file per part of the state
            COMPLETE        written last: the format, and size and checksum of every file
        latest              the name of the newest checkpoint, for people and scripts

Of several processes each writes what it has of a part: the first one model.pt, the others
model-0001.pt, model-0002.pt and so on, which together are the part. How many there were does not
matter to whoever reads it.

A checkpoint is written into a temporary folder, its completion marker last, flushed to disk and
renamed; ``latest`` follows. Whatever moment a run is cut off at, the checkpoints that carry a
marker and files of the sizes it lists are whole, and every other folder is ignored. Checksums are
compared before a checkpoint is used, and files that the marker does not list are not read.

Files are read with ``weights_only``: a checkpoint cannot carry code. Whether they hold what a run
takes over is form.py's to say.
"""

import fcntl
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from mst_train.distributed.guard import together
from mst_train.distributed.topology import Topology
from mst_train.errors import TrainingError, UserError, reason_of
from mst_train.files import UNFINISHED, remove_folder, remove_unfinished, replace_text

MARKER = "COMPLETE"

FORMAT = 1
"""Raise it when the files mean something else. Markers without one are older, and of format 1."""

RUNS = Path("runs")
"""Where runs are that are given no other folder."""

log = logging.getLogger(__name__)

_STEP = re.compile(r"step_(\d{8,})")
_FILE = re.compile(r"([a-z]+)(-\d{4,})?\.pt")


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], keep: int, processes: Topology | None = None
) -> Path:
    """Write ``state``, one file per key, as the checkpoint of ``step``; keep the newest ``keep``.

    ``folder`` is made where it is not there, but not the run's folder that it is in.

    Several ``processes`` each write their own ``state`` into the same checkpoint; a key's values
    are then dicts without common keys. Returns the checkpoint's folder. Raises TrainingError where
    it cannot be written; the checkpoints that are there already are left alone.
    """
    processes = processes or Topology()
    name = f"step_{step:08d}"
    final, temporary = folder / name, folder / f"{UNFINISHED}{name}"
    suffix = f"-{processes.rank:04d}.pt" if processes.rank else ".pt"
    try:
        with together(processes), _writing(final):
            if processes.is_rank_zero:
                folder.mkdir(exist_ok=True)
                remove_unfinished(folder)
                temporary.mkdir()
        with together(processes), _writing(final):
            own = {
                f"{key}{suffix}": _write(temporary / f"{key}{suffix}", state[key]) for key in state
            }
        everyones = processes.gather(own)
        with together(processes), _writing(final):
            if processes.is_rank_zero:
                files = {file: written for one in everyones for file, written in one.items()}
                marker = {"format": FORMAT, "step": step, "files": files}
                replace_text(temporary / MARKER, json.dumps(marker, indent=1) + "\n")
                if final.exists():  # damaged, or it would not be written again
                    remove_folder(final)
                temporary.rename(final)
                replace_text(folder / "latest", name + "\n")
    except TrainingError:
        if processes.is_rank_zero:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if processes.is_rank_zero:
        _delete_old(folder, step, keep)
    return final


@contextmanager
def _writing(final: Path) -> Iterator[None]:
    """Have errors say which checkpoint could not be written, and what to do (TrainingError)."""
    try:
        yield
    # The latter is what torch makes of failures of its file writer.
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"cannot write the checkpoint {final}: {reason_of(error)}. The ones before it are "
            f"whole: make room or give permission there, and the same command continues"
        ) from error


def _delete_old(folder: Path, step: int, keep: int) -> None:
    """Delete all that is older than the newest ``keep`` whole checkpoints up to ``step``.

    Later ones are of work that was lost with them, and do not count.
    """
    whole = [path for path in _folders(folder) if _problem(path) is None]
    kept = [path for path in whole if _step(path) <= step][-keep:]
    for path in _folders(folder):
        if kept and _step(path) < _step(kept[0]):
            _delete(path)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint; one that is ``held`` stays, for the next time."""
    try:
        with ExitStack() as stack:
            if (checkpoint / MARKER).is_file():
                # For writing too: network file systems give no other an exclusive lock.
                marker = stack.enter_context((checkpoint / MARKER).open("r+"))
                fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_folder(checkpoint)
    except BlockingIOError:
        pass
    except OSError as error:
        log.warning("the old checkpoint %s cannot be deleted: %s", checkpoint, error.strerror)


def _folders(folder: Path) -> list[Path]:
    """The checkpoints' folders, whole or not, oldest first."""
    return sorted((path for path in folder.glob("step_*") if _STEP.fullmatch(path.name)), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first; warns of those that are not."""
    found = {path: _problem(path) for path in _folders(folder)}
    while not all(path.exists() for path in found):
        # A run has just deleted one, and has newer ones.
        found = {path: _problem(path) for path in _folders(folder)}
    for path, problem in found.items():
        if problem is not None:
            log.warning("ignoring the checkpoint %s: %s", path, problem)
    return [path for path, problem in found.items() if problem is None]


def own_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints that a run can continue from, the best first; warns of others.

    Raises UserError where there were some and none is whole. One that was never finished, because
    its writing was cut off, does not count.
    """
    complete = complete_checkpoints(folder)[::-1]
    if not complete and any((path / MARKER).exists() for path in _folders(folder)):
        raise _all_damaged(folder)
    return complete


def _all_damaged(folder: Path) -> UserError:
    return UserError(
        f"every checkpoint in {folder} is damaged, or of a version that this one does not read: "
        f"start anew with another run.dir, or from another run's checkpoint with run.resume"
    )


def find_checkpoint(path: Path, setting: str = "run.resume") -> Path:
    """The first of ``find_checkpoints``."""
    return find_checkpoints(path, setting)[0]


def find_checkpoints(path: Path, setting: str) -> list[Path]:
    """The checkpoints that ``path`` names: itself, or those of a run's or checkpoints' folder, the
    newest first.

    setting: where it was named.

    Raises UserError where there is none.
    """
    if (path / MARKER).exists():
        problem = _problem(path)
        if problem:
            raise UserError(f"the checkpoint {path} is not whole: {problem}; choose another one")
        return [path]
    for folder in (path, path / "checkpoints"):
        complete = complete_checkpoints(folder)
        if complete:
            return complete[::-1]
    if complete_checkpoints(RUNS / path / "checkpoints"):
        raise UserError(
            f"{setting}={path} is no place with a whole checkpoint: did you mean "
            f"{setting}={RUNS / path}?"
        )
    also = ", nor auto or never" if setting == "run.resume" else ""
    raise UserError(
        f"{setting}={path} is no place with a whole checkpoint{also}: give a run's folder, or a "
        f"folder step_NNNNNNNN that holds a file {MARKER}"
    )


def first_undamaged(checkpoints: list[Path]) -> Path | None:
    """The first of these whose files are what was written; warns of those before it.

    Reads every file of a checkpoint once. Raises UserError where all of them are damaged.
    """
    for checkpoint in checkpoints:
        problem = _problem(checkpoint, read=True)
        if problem is None:
            return checkpoint
        log.warning("the checkpoint %s is damaged: %s", checkpoint, problem)
    if checkpoints:
        raise _all_damaged(checkpoints[0].parent)
    return None


@contextmanager
def held(find: Callable[[], list[Path]]) -> Iterator[Path | None]:
    """The ``first_undamaged`` of the checkpoints that ``find`` lists, for reading.

    While this lasts, a run that is writing there does not delete the first of them. Where it has
    done so already, there are newer ones, and ``find`` is asked again.
    """
    with ExitStack() as stack:
        checkpoints = find()
        while checkpoints and not _hold(checkpoints[0], stack):
            checkpoints = find()
        yield first_undamaged(checkpoints)


def _hold(checkpoint: Path, stack: ExitStack) -> bool:
    """Keep a checkpoint from being deleted until ``stack`` is closed; whether it is there still."""
    try:
        marker = stack.enter_context((checkpoint / MARKER).open())
    except FileNotFoundError:
        return False
    fcntl.flock(marker, fcntl.LOCK_SH)
    return (checkpoint / MARKER).exists()


def load_part(checkpoint: Path, key: str) -> dict[str, Any]:
    """One part of a checkpoint's state, on the CPU. Raises UserError where it cannot be read."""
    try:
        files = [name for name in _listed(checkpoint) if _key(name) == key]
    except _NotWhole as problem:
        raise UserError(f"the checkpoint {checkpoint} cannot be read: {problem}") from problem
    if not files:
        raise UserError(f"the checkpoint {checkpoint} has no {key}.pt: it is none of a run")
    part: dict[str, Any] = {}
    for name in files:
        more = _load(checkpoint / name)
        if not isinstance(more, dict) or part.keys() & more.keys():
            raise UserError(f"{checkpoint / name} is no part of a checkpoint: it was not made here")
        part |= more
    return part


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # What the reader stumbles over in a file that is none of ours can be anything.
    except Exception as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from error


class _NotWhole(Exception):
    """What is missing of a checkpoint, or wrong with it."""


def _key(file: str) -> str | None:
    """The part of the state that a file of this name holds some of."""
    match = _FILE.fullmatch(file)
    return match and match[1]


def _listed(checkpoint: Path) -> dict[str, dict[str, int]]:
    """Size and checksum of a checkpoint's files, by name, as its marker lists them (_NotWhole)."""
    if not (checkpoint / MARKER).is_file():
        raise _NotWhole(f"it has no {MARKER} file, so its writing was cut off")
    try:
        marker = json.loads((checkpoint / MARKER).read_text())
    except (OSError, ValueError, RecursionError):
        raise _NotWhole(f"its {MARKER} file cannot be read") from None
    marker = {"format": FORMAT} | (marker if isinstance(marker, dict) else {})
    version, files = marker["format"], marker.get("files")
    if not (type(version) is int and version == FORMAT):
        raise _NotWhole(f"it is of format {version!r:.40}, and this version reads {FORMAT}")
    if (
        marker.keys() != {"format", "step", "files"}
        or type(marker["step"]) is not int
        or not (isinstance(files, dict) and files)
        or not all(_is_entry(written) for written in files.values())
    ):
        raise _NotWhole(f"its {MARKER} file does not list the checkpoint's files")
    for name in files:
        if _key(name) is None:
            raise _NotWhole(f"its {MARKER} file names {name!r:.80}, which is no file of one")
    if _STEP.fullmatch(checkpoint.name) and marker["step"] != _step(checkpoint):
        raise _NotWhole(f"its {MARKER} file is of step {marker['step']}")
    return files


def _is_entry(written: Any) -> bool:
    return (
        isinstance(written, dict)
        and written.keys() == {"bytes", "crc32"}
        and all(type(number) is int and number >= 0 for number in written.values())
    )


def _problem(checkpoint: Path, *, read: bool = False) -> str | None:
    """What is missing of a checkpoint; None where it is whole.

    read: compare its files with their checksums too.
    """
    try:
        for name, written in _listed(checkpoint).items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            size = (checkpoint / name).stat().st_size
            if size != written["bytes"]:
                return f"{name} has {size} bytes where {written['bytes']} were written"
            if read and _checksum(checkpoint / name) != written["crc32"]:
                return f"{name} has changed"
    except _NotWhole as problem:
        return str(problem)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
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
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": summed.bytes, "crc32": summed.crc32}


def _checksum(path: Path) -> int:
    crc32 = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            crc32 = zlib.crc32(block, crc32)
    return crc32
