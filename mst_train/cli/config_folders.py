"""Where configuration files are: this project's folder, and one of the user's."""

import os
import sysconfig
from pathlib import Path

from mst_train.errors import UserError

VARIABLE = "MST_CONFIG_DIR"
OPTION = "--config-dir"


def config_folders() -> list[Path]:
    """The project's own folder, and the user's if there is one.

    Raises UserError where the user's is none, or has a file of the same name as the project's.
    """
    own, named = _own_folder(), os.environ.get(VARIABLE)
    if not named:
        return [own]
    folder = Path(named).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(
            f"{OPTION} {named} (or {VARIABLE}) is not a folder: name one with folders such as "
            f"model/"
        )
    names = (path.relative_to(folder) for path in sorted(folder.glob("**/*.yaml")))
    taken = [name for name in names if (own / name).exists()]
    if taken:
        raise UserError(f"{folder / taken[0]} has the name of a file in {own}: give it another")
    return [own, folder]


def groups(folders: list[Path]) -> list[str]:
    """The groups of configuration files, in order of their names."""
    return sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})


def choices(group: str) -> list[str]:
    """The names of a group's files."""
    return sorted(p.stem for folder in config_folders() for p in (folder / group).glob("*.yaml"))


def take_option(arguments: list[str]) -> list[str]:
    """The arguments without ``--config-dir DIR``, which is the variable's value from now on."""
    kept, words = list[str](), iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != OPTION:
            kept.append(word)
            continue
        folder = value if equals else next(words, "")
        if not folder:
            raise UserError(f"{OPTION} names no folder: {OPTION} DIR")
        os.environ[VARIABLE] = folder
    return kept


def _own_folder() -> Path:
    """The checkout's, or the installed copy."""
    beside = Path(__file__).parents[2]
    installed = Path("share", "mst_train", "configs")
    places = [beside / "configs", beside / installed, Path(sysconfig.get_path("data")) / installed]
    return next((place for place in places if place.is_dir()), places[0])
