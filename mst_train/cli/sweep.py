"""A sweep: settings with several values, optimizer.learning_rate=1e-3,3e-3, one run for each."""

import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from mst_train.cli.compose import compose
from mst_train.config import Config
from mst_train.errors import UserError
from mst_train.files import name_of
from mst_train.rendezvous.dist_env import world_size

ENDING = (signal.SIGTERM, signal.SIGUSR1)


class Point(NamedTuple):
    """One run of a sweep."""

    arguments: list[str]
    config: Config


def points(arguments: Sequence[str]) -> list[Point]:
    """The runs that arguments with several values stand for; empty where each has one.

    Each is named after its own values, behind the name that it would have. Raises UserError where
    one of them cannot be, or two would have the same folder.
    """
    parser = OverridesParser.create()
    choices = [_values(parser, argument) for argument in arguments]
    if all(len(values) == 1 for values in choices):
        return []
    if world_size() > 1:
        raise UserError("a sweep starts each of its runs by itself: give each setting one value")
    found = []
    for chosen in itertools.product(*choices):
        own = [some for some, values in zip(chosen, choices, strict=True) if len(values) > 1]
        name = "-".join([compose(chosen).run.name, *map(_label, own)])
        point = [*chosen, f"run.name={name}"]
        found.append(Point(point, compose(point)))
    folders = {point.config.run.dir for point in found}
    if len(folders) < len(found):
        raise UserError(
            f"the runs of this sweep would meet in {found[0].config.run.dir}: leave run.dir out, "
            f"or put ${{run.name}} into it"
        )
    return found


def run_all(found: Sequence[Point]) -> int:
    """Run them one after the other; returns the first status that is not 0, if there is one.

    A run that fails does not keep the others from theirs; one that a signal stops does.
    """
    statuses = []
    for number, point in enumerate(found, 1):
        print(f"sweep: {number} of {len(found)}, {point.config.run.name}", file=sys.stderr)
        process = subprocess.Popen([sys.executable, "-m", "mst_train", *point.arguments])
        with _handing_on(process):
            status = process.wait()
        statuses.append(status if status >= 0 else 128 - status)
        if statuses[-1] > 128:
            break
    return next(filter(None, statuses), 0)


@contextmanager
def _handing_on(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Signals that end a run are the process's, not this one's."""

    def hand_on(received: int, _: object) -> None:
        process.send_signal(received)

    before = {ending: signal.signal(ending, hand_on) for ending in ENDING}
    try:
        yield
    finally:
        for ending, handler in before.items():
            signal.signal(ending, handler)


def _values(parser: OverridesParser, argument: str) -> list[str]:
    """The argument with each of its values."""
    try:
        override = parser.parse_override(argument)
    except (HydraException, ValueError):  # composing says what is wrong with it
        return [argument]
    if not override.is_choice_sweep():
        return [argument]
    key = argument.partition("=")[0]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _label(argument: str) -> str:
    key, _, value = argument.partition("=")
    return f"{key.rpartition('.')[2]}_{name_of(value)}"
