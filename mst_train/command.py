"""What all commands share: how an error becomes a message and an exit status."""

import logging
import sys
from collections.abc import Callable

from mst_train.errors import Stopped, TrainingError, UserError
from mst_train.launched import process_name, rank


def run_command(
    command: Callable[[list[str]], int], arguments: list[str] | None, interrupted: str
) -> int:
    """Run ``command`` with ``arguments`` (None: the process's own); returns its exit status.

    2 and one line per problem for what the user gave; 1 and one line for what failed later; 143 and
    138 and one line for SIGTERM and SIGUSR1, which asked a run to stop; 130 and ``interrupted`` for
    Ctrl-C. Anything else is a bug and keeps its traceback.

    Of several processes the first one logs; the others only say what ends them, with their names.
    An error without a message is one that another process tells.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mst_train").setLevel(logging.ERROR if rank() else logging.INFO)
    try:
        return command(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        for problem in error.problems:
            _tell("error", problem)
        return 2
    except Stopped as stopped:
        _tell("stopped", str(stopped))
        return stopped.status
    except TrainingError as error:
        _tell("error", str(error))
        return 1
    except BrokenPipeError:
        return 1
    except OSError as error:
        _tell("error", f"{error.filename or 'a file'}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        _tell("interrupted", "" if rank() else interrupted)
        return 130


def _tell(what: str, message: str) -> None:
    if message:
        who = f"{process_name()}: " if rank() else ""
        print(f"{who}{what}: {message}", file=sys.stderr)
