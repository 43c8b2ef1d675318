"""Checkpoints: whole or not there.

    checkpoints/
        step_00000050/      model.pt, optimizer.pt, ... : one file per part of the state
            COMPLETE        written last: the size of every file
        latest              the name of the newest checkpoint, for people and scripts

A checkpoint is written into a temporary folder, flushed to disk and renamed; its completion marker
follows, and ``latest`` last. Whatever moment a run is cut off at, the checkpoints that carry a
marker and files of the sizes it lists are whole, and every other folder is ignored.

Files are read with ``weights_only``: a checkpoint cannot carry code.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from mst_train.errors import TrainingError, UserError

MARKER = "COMPLETE"
TEMPORARY = ".writing-"

log = logging.getLogger(__name__)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``state``, one file per key, as the checkpoint of ``step``; keep the newest ``keep``.

    Returns the checkpoint's folder. Raises TrainingError where it cannot be written; the
    checkpoints that are there already are left alone.
    """
    name = f"step_{step:08d}"
    final, temporary = folder / name, folder / f"{TEMPORARY}{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in (final, *folder.glob(f"{TEMPORARY}*")):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        for key, value in state.items():
            with (temporary / f"{key}.pt").open("wb") as file:
                torch.save(value, file)
                _flush(file)
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        temporary.rename(final)
        _replace(final / MARKER, json.dumps({"step": step, "files": sizes}, indent=1) + "\n")
        _replace(folder / "latest", name + "\n")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingError(f"cannot write the checkpoint {final}: {error}") from error
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


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
        f"run.resume={path}: there is no whole checkpoint here; give a run's folder, or a folder "
        f"step_NNNNNNNN that holds a file {MARKER}"
    )


def load_part(checkpoint: Path, key: str) -> Any:
    """One part of a checkpoint's state, on the CPU. Raises UserError where it cannot be read."""
    path = checkpoint / f"{key}.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"cannot read {path}: {reason}; remove {checkpoint} to use the checkpoint before it"
        ) from error


def _incomplete(path: Path) -> str | None:
    """What is missing of a checkpoint; None where it is whole."""
    try:
        files = json.loads((path / MARKER).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {MARKER} file, so its writing was cut off"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MARKER} file cannot be read"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes where {size} were written"
    return None


def _replace(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all, and is on disk on return."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        _flush(file)
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
