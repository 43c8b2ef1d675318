"""The folder of the run that a command reads, where its arguments may leave out run.dir."""

import logging
from collections.abc import Sequence
from pathlib import Path

from mst_train.errors import UserError
from mst_train.files import expanded

log = logging.getLogger(__name__)


def check_names_no_checkpoint(arguments: Sequence[str]) -> None:
    """UserError where a run is named as ``export`` takes it, and not by its run.dir."""
    for argument in arguments:
        key, _, folder = argument.lstrip("+").partition("=")
        if key == "checkpoint":
            raise UserError(f"cannot use {argument}: name the run as run.dir={folder or 'DIR'}")


def run_folder(run_dir: str, arguments: Sequence[str]) -> Path:
    """The folder ``run_dir``, as composed of ``arguments``; a line names it where they do not.

    Raises UserError where it is not there, and was not given or has other runs beside it: the
    newest of these is the example.
    """
    folder = expanded(run_dir)
    given = any(argument.lstrip("+").startswith("run.dir=") for argument in arguments)
    if folder.exists():
        if not given:
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
