"""What the processes of a run have to agree about before they go on.

together     an error of one is an error of all, told once
told_once    an error that all have anyway
check_same   whether they were started with the same things
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from mst_train.errors import DataError, Ending, InUse, TrainingError, UserError
from mst_train.launched import process_name
from mst_train.parallel.topology import Topology

Failure = UserError | TrainingError
E = TypeVar("E", bound=Ending)


@contextmanager
def together(topology: Topology) -> Iterator[None]:
    """Run what each process does by itself, and go on only where all have come through.

    Where some fail with a UserError, DataError or TrainingError, all raise one: on the first
    process with the messages of those that failed, on the others without any, so that it is printed
    once. All processes come here together; no exchange belongs inside.
    """
    if topology.world == 1:
        yield
        return
    failure: Failure | None = None
    try:
        yield
    except (UserError, TrainingError) as error:
        failure = error
    own = (type(failure).__name__, _problems(failure), process_name()) if failure else None
    failures = [one for one in topology.gather(own) if one is not None]
    if failures:
        raise _common(failures, topology) from failure


def told_once(error: E, topology: Topology) -> E:
    """``error``, which every process is about to raise, without its message but on the first."""
    error.shared = True
    if not topology.is_first:
        error.args = ("",)
        if isinstance(error, UserError):
            error.problems = []
    return error


def check_same(topology: Topology, things: Mapping[str, str]) -> None:
    """Compare what the processes have: names of things to their text or fingerprint.

    Raises UserError, which names the processes that differ from the first and what in.
    """
    everyone = topology.gather((dict(things), process_name()))
    first, _ = everyone[0]
    problems = []
    for name in first:
        others = [(process, theirs[name]) for theirs, process in everyone]
        different = [(process, value) for process, value in others if value != first[name]]
        if different:
            who = ", ".join(process for process, _ in different)
            problems.append(
                f"{name} is not the same everywhere: {who} has {different[0][1]}, and "
                f"{everyone[0][1]} has {first[name]}. Start all processes with the same"
            )
    if problems:
        raise told_once(UserError(problems), topology)


def _problems(error: Failure) -> list[str]:
    return error.problems if isinstance(error, UserError) else [str(error)]


def _common(failures: list[tuple[str, list[str], str]], topology: Topology) -> Failure:
    """The error that stands for several processes' ones."""
    kind, messages, _ = failures[0]
    if len(failures) < topology.world or any(texts != messages for _, texts, _ in failures):
        messages = [f"{process}: {text}" for _, texts, process in failures for text in texts]
    if kind in (UserError.__name__, InUse.__name__):
        return told_once((UserError if kind == UserError.__name__ else InUse)(messages), topology)
    error = (DataError if kind == DataError.__name__ else TrainingError)("; ".join(messages))
    return told_once(error, topology)
