"""torchrun for launch/torchrun.sh: with an exit status that a scheduler can use, and restarts.

    torchrun.py RESTARTS ARGUMENT_OF_TORCHRUN ...

torchrun's own status is 1 whatever has happened. This one is that of the process that failed first,
128 + N where signal N ended it, and 128 + N where torchrun itself got signal N: it has then passed
it on to the processes and waited for them, TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds at most.

torchrun's own --max_restarts is not used: it starts again what was stopped on purpose, and the
processes then meet in the store of those before, where they find addresses that are no more.
"""

import sys
import time

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

FINAL = (0, 2, 130, 138, 143)
"""Success, something given that cannot be, a signal: nothing to start again for."""

PATIENCE = 900
"""Seconds for the machines to meet again."""


def run(restarts: int, arguments: list[str]) -> int:
    """Start the processes, and again where they fail; returns the exit status."""
    status = 0
    try:
        for attempt in range(restarts + 1):
            if attempt:
                print(f"starting again ({attempt} of {restarts})", file=sys.stderr)
            status = _attempt(attempt, arguments)
            if status in FINAL:
                break
    except SignalException as stopped:
        return 128 + stopped.sigval
    return status


def _attempt(number: int, arguments: list[str]) -> int:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            main(["--rdzv_id", f"attempt_{number}", *arguments])
            return 0
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            status, ended = failure.exitcode, f"with status {failure.exitcode}"
            if status < 0:
                status, ended = 128 - status, f"by {failure.signal_name()}"
            print(f"process {rank} was the first to end, {ended}", file=sys.stderr)
            return status
        except DistError as error:
            # Another machine may still be busy with the end of the attempt before.
            if number == 0 or time.monotonic() > deadline:
                reason = str(error).partition("\n")[0]
                print(f"error: the machines do not find each other: {reason}", file=sys.stderr)
                return 1
            time.sleep(1)


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), sys.argv[2:]))
