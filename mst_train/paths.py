"""Paths as a user writes them."""

from pathlib import Path

from mst_train.errors import UserError


def expanded(path: str | Path) -> Path:
    """The path, with ``~`` and ``~NAME`` at its beginning as the home folders that they mean.

    Raises UserError where there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such home folder: write the whole path") from error
