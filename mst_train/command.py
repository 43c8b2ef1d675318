"""What all commands share: how an error becomes a message and an exit status."""

import logging
import sys
from collections.abc import Callable

from mst_train.errors import Stopped, TrainingError, UserError


def run_command(
    command: Callable[[list[str]], int], arguments: list[str] | None, interrupted: str
) -> int:
    """Run ``command`` with ``arguments`` (None: the process's own); returns its exit status.

    2 and one line per problem for what the user gave; 1 and one line for what failed later; 143 and
    138 and one line for SIGTERM and SIGUSR1, which asked a run to stop; 130 and ``interrupted`` for
    Ctrl-C. Anything else is a bug and keeps its traceback.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mst_train").setLevel(logging.INFO)
    try:
        return command(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return stopped.status
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
