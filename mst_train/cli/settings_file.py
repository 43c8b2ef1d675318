"""The settings of a run, to begin another one with: +experiment=runs/NAME."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from mst_train.cli.config_files import file_problems
from mst_train.cli.settings import shown
from mst_train.config import lookup
from mst_train.errors import UserError
from mst_train.files import expanded


def settings_file(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file that an experiment's path names, and the other arguments.

    Raises UserError where there is no such file, or several are named.
    """
    paths = [
        argument
        for argument in arguments
        if argument.lstrip("+").startswith("experiment=")
        and ("/" in argument or argument.endswith(".yaml"))
    ]
    if not paths:
        return None, list(arguments)
    path = expanded(paths[0].partition("=")[2])
    path = path / "config.yaml" if path.is_dir() else path
    if len(paths) > 1 or not path.is_file():
        given = " ".join(shown(argument.lstrip("+")) for argument in paths)
        raise UserError(
            f"{given}: give one experiment, a run's folder or a file of settings that is there"
        )
    return path, [argument for argument in arguments if argument not in paths]


def another_run(
    path: Path, arguments: Sequence[str], text_problem: Callable[[str], str | None]
) -> dict[str, Any]:
    """The settings of a file, for another run than the one that wrote it.

    text_problem: says what is wrong with the interpolations of a text, if anything.

    Raises UserError where it holds none, or the arguments give the new run no name.
    """
    problems = list(file_problems([path.parent], path.stem, text_problem))
    if problems:
        raise UserError(problems)
    tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if "defaults" in tree:
        raise UserError(
            f"{path} has defaults: put it into a folder experiment/ in one that --config-dir names"
        )
    if not any(argument.startswith("run.name=") for argument in arguments):
        raise UserError(f"the settings of {path} are for another run now: give run.name=NAME")
    return {name: group for name, group in tree.items() if name != "run"}


def trained_length(path: Path) -> int | None:
    """The length that a run's model was trained on, before its positions were stretched if they
    are; None where neither ``path`` nor the run around a checkpoint has settings that say it.
    """
    for folder in (path, path.parent.parent):
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            stretched = lookup(tree, "model.rope_scaling.original_length")
            length = stretched or lookup(tree, "data.sequence_length")
            if isinstance(length, int):
                return length
    return None
