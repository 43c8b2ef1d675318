"""The errors that end a command with one clear message instead of a traceback."""

from collections.abc import Sequence


def reason_of(error: Exception) -> str:
    """The first line of what an error says; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Ending(Exception):
    """What ends a command.

    shared: of several processes all raise it, and the first one tells it for all.
    """

    shared = False
    status = 1
    """The command's exit status."""


class UserError(Ending):
    """Something the user gave (a setting, a file, a data set, a checkpoint) cannot be used.

    Commands print the message and exit with status 2. Each problem says what is wrong, where
    (the configuration key or the file), and what to do about it.
    """

    status = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class InUse(UserError):
    """What the user gave is another process's at the moment: the same command may succeed later.

    Commands print the message and exit with status 75, which is sysexits.h's for that.
    """

    status = 75


class TrainingError(Ending):
    """A run that started well cannot go on (a loss that is not finite, memory that ran out).

    Commands print the message and exit with status 1; everything up to the last checkpoint is kept.
    """


class DataError(TrainingError):
    """Data that a run has begun to read cannot be read any further."""


class LostContact(TrainingError):
    """Another process has gone, or does not answer: what waits for it does so for ever."""


class Stopped(Ending):
    """A signal asked the run to stop, and its work is saved.

    Commands print the message and exit with 128 + the signal's number, which is what a shell
    reports of a process that the signal ended.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        self.status = 128 + signal_number
        super().__init__(message)


def memory_ran_out(error: BaseException) -> str | None:
    """Whose memory an error of Python's or torch's is for want of: host or device; None: no one's.

    torch's own class for it is known by its name: commands import this before torch.
    """
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "host"
    said = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    if type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in said):
        return "device" if isinstance(error, RuntimeError) else None
    return None
