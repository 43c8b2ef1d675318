"""What the processes of a run have to agree about before they go on.

Guard        an error of one is an error of all when they meet, told once
together     the same for a few lines, which all leave together
told_once    an error that all have anyway
check_same   whether they were started with the same things
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from mst_train.distributed.topology import Topology
from mst_train.errors import DataError, Ending, InUse, TrainingError, UserError
from mst_train.rendezvous.dist_env import process_name

Failure = UserError | TrainingError
E = TypeVar("E", bound=Ending)
T = TypeVar("T")


class Guard:
    """Errors of one process, kept until all meet: there they are errors of all, told once.

    What each process does by itself, and may fail at with a UserError or TrainingError, stands in
    ``deferred``; no exchange belongs inside. A process that is alone keeps nothing back.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._failure: Failure | None = None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """An error in here is raised by the next ``meet``; the first of several."""
        try:
            yield
        except (UserError, TrainingError) as error:
            if self._topology.world == 1:
                raise
            self._failure = self._failure or error

    def meet(self, value: T) -> list[T]:
        """What every process has given, by rank, as ``Topology.gather`` gives it.

        All processes come here together.

        Where some have failed since they last met, all raise one error: on the first process with
        the messages of those that failed, on the others without any, so that it is printed once.
        """
        failure, self._failure = self._failure, None
        told = failure and (type(failure).__name__, _problems(failure), process_name())
        values, everyone = zip(*self._topology.gather((value, told)), strict=True)
        failures = [one for one in everyone if one is not None]
        if failures:
            raise _common(failures, self._topology) from failure
        return list(values)


@contextmanager
def together(topology: Topology) -> Iterator[None]:
    """Run what each process does by itself, and go on only where all have come through."""
    guard = Guard(topology)
    with guard.deferred():
        yield
    guard.meet(None)


def told_once(error: E, topology: Topology) -> E:
    """``error``, which every process is about to raise, without its message but on the first."""
    error.shared = True
    if not topology.is_rank_zero:
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
