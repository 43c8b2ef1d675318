"""The folder of the run that a command reads, where its arguments may leave out run.dir."""

import logging
from collections.abc import Sequence
from pathlib import Path

from mst_train.errors import UserError
from mst_train.files import expanded

log = logging.getLogger(__name__)


def run_folder(run_dir: str, arguments: Sequence[str]) -> Path:
    """The folder ``run_dir``, as composed of ``arguments``; a line names it where they do not.

    Raises UserError where it is not there but other runs are beside it: the newest is the example.
    """
    folder = expanded(run_dir)
    given = any(argument.lstrip("+").startswith("run.dir=") for argument in arguments)
    if folder.exists():
        if not given:
            log.info("run.dir is not given: taking the run in %s", folder)
        return folder
    runs = {path.parent: path.stat().st_mtime for path in folder.parent.glob("*/metrics.jsonl")}
    if runs:
        named = "" if given else ", which is taken where run.dir is not given"
        raise UserError(
            f"there is no run in {folder}{named}: give the folder of one as run.dir=DIR, such as "
            f"run.dir={max(runs, key=runs.__getitem__)}, the newest beside it"
        )
    return folder
