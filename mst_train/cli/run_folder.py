"""The run, or the checkpoint, that a command reads, as its arguments name it."""

import logging
from collections.abc import Sequence
from pathlib import Path

from mst_train.cli.compose import check_arguments, compose
from mst_train.errors import UserError
from mst_train.files import expanded

WEIGHTS = ("model", "precision")
"""Settings that a run's checkpoint decides."""

log = logging.getLogger(__name__)


def named_run(arguments: Sequence[str], *, tell: bool = True) -> Path | None:
    """The folder of the run, or of one of its checkpoints, that a command reads; None: it reads
    ``model.from_pretrained``, a checkpoint in Hugging Face's format.

    tell: say which run it is, where they do not. Nothing here imports torch: a command asks before
        it does, and answers a mistake at once.

    Raises UserError where there is no such folder, or the arguments cannot be used.
    """
    keys = [argument.lstrip("+").partition("=")[0] for argument in arguments]
    if "model.from_pretrained" in keys:
        of_run = [argument for argument in arguments if argument.lstrip("+").startswith("run.")]
        if of_run:
            raise UserError(
                f"{' '.join(of_run)} and model.from_pretrained both say which model: leave one out"
            )
        check_arguments(arguments)
        return None
    check_names_run(arguments)
    changed = [
        argument
        for argument, key in zip(arguments, keys, strict=True)
        if key.partition(".")[0] in WEIGHTS
    ]
    if changed:
        raise UserError(
            f"cannot use {' '.join(changed)}: the model and its type are the checkpoint's"
        )
    check_arguments(arguments)
    names_run = ("run.", "experiment=")
    named = [a for a in arguments if a.lstrip("+").startswith(names_run)]
    return run_folder(compose(named).run.dir, named, tell=tell)


def check_names_run(arguments: Sequence[str]) -> None:
    """UserError where a run is named, and not by its run.dir: as ``export`` takes it, or as a
    folder alone."""
    for argument in arguments:
        key, equals, folder = argument.lstrip("+").partition("=")
        if equals and key == "checkpoint":
            raise UserError(f"cannot use {argument}: name the run as run.dir={folder or 'DIR'}")
        if not equals and expanded(argument).is_dir():
            raise UserError(f"cannot use {argument}: name the run as run.dir={argument}")


def run_folder(run_dir: str, arguments: Sequence[str], *, tell: bool = True) -> Path:
    """The folder ``run_dir``, as composed of ``arguments``; a line names it where they do not.

    Raises UserError where it is not there, and was not given or has other runs beside it: the
    newest of these is the example.
    """
    folder = expanded(run_dir)
    given = any(argument.lstrip("+").startswith("run.dir=") for argument in arguments)
    if folder.exists():
        if tell and not given:
            log.info("run.dir is not given: taking the run in %s", folder)
        return folder
    runs = {path.parent: path.stat().st_mtime for path in folder.parent.glob("*/metrics.jsonl")}
    if runs or not given:
        named = "" if given else ", which is taken where run.dir is not given"
        newest = max(runs, key=runs.__getitem__, default=None)
        such = f", such as run.dir={newest}, the newest beside it" if newest else ""
        raise UserError(
            f"there is no run in {folder}{named}: give the folder of one as run.dir=DIR{such}"
        )
    return folder
