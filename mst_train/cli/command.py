"""What all commands share: how an error becomes a message and an exit status."""

import contextlib
import errno
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mst_train import __version__
from mst_train.cli.config_folders import take_option
from mst_train.cli.signals import interruptible_once
from mst_train.errors import (
    LostContact,
    Stopped,
    TrainingError,
    UserError,
    memory_ran_out,
    reason_of,
)
from mst_train.rendezvous.dist_env import end_with_launcher, process_name, rank, world_size

FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
"""What is wrong with a path until the user changes it."""

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Where a user may have said how torch takes a GPU's memory; read when CUDA starts."""

EXPANDABLE = "expandable_segments:True"

FRAMEWORK = (
    "datasets",
    "huggingface_hub",
    "hydra",
    "matplotlib",
    "omegaconf",
    "pyarrow",
    "rich",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "tqdm",
    "wandb",
    "yaml",
)
"""Packages of the extra "train", which a plain install, for the method alone, does not have."""


def has_expandable_segments() -> bool:
    """Whether torch is told to let segments of a GPU's memory grow."""
    told = next((os.environ[name] for name in ALLOCATOR if name in os.environ), "")
    return EXPANDABLE in told


def run_command(
    command: Callable[[list[str]], int], arguments: list[str] | None, interrupted: str
) -> int:
    """Run ``command`` with ``arguments`` (None: the process's own); returns its exit status.

    With --version among them the version is printed instead.

    2 and one line per problem for what the user gave, for a path that is forbidden and for a
    package that is not installed; 75 where another process is using a path; 1 and one line for what
    failed later; 143 and 138 and one line for SIGTERM and SIGUSR1, which asked a run to stop; 130
    and ``interrupted`` for Ctrl-C. Anything else is a bug and keeps its traceback.

    Of several processes the first one logs; the others only say what ends them, with their names.
    An error without a message is one that another process tells.
    """
    end_with_launcher()
    _repair_streams()
    if not any(name in os.environ for name in ALLOCATOR):
        # Chunks and their gradients have many sizes: whole segments for each would leave gaps.
        os.environ[ALLOCATOR[0]] = EXPANDABLE
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mst_train").setLevel(logging.ERROR if rank() else logging.INFO)
    try:
        _require_working_folder()
        with interruptible_once():
            given = sys.argv[1:] if arguments is None else arguments
            if "--version" in given:
                show(f"mst_train {__version__}")
                return 0
            with told_once():
                given = take_option(given)
            status = command(given)
            print(end="", flush=True)
            return status
    except UserError as error:
        for problem in error.problems:
            _tell("error", problem)
        return error.status
    except Stopped as stopped:
        _tell("stopped", str(stopped))
        return stopped.status
    except TrainingError as error:
        _tell("error", str(error))
        if isinstance(error, LostContact):
            with contextlib.suppress(OSError):
                print(end="", flush=True)
            os._exit(1)  # threads that still wait for the others would abort Python's own end
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in FRAMEWORK:
            raise
        _tell("error", f"{package} is not installed: pip install 'mst-train[train]'")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        advice = "make the model or data.sequence_length smaller"
        _tell("error", f"memory ran out: {advice} ({reason_of(error)})")
        return 1
    except BrokenPipeError:
        _is_output_lost()
        return 1
    except OSError as error:
        unnamed = "standard output" if _is_output_lost() else "a file"
        _tell("error", f"{error.filename or unnamed}: {error.strerror or error}")
        return 2 if error.filename and error.errno in FORBIDDEN else 1
    except KeyboardInterrupt:
        _tell("interrupted", "" if rank() else interrupted)
        return 130


def show(text: str) -> None:
    """Print what every process would print the same; the first one does."""
    if rank() == 0:
        print(text, flush=True)


def show_help(page: str) -> None:
    """Show a command's page, with --version, which every command has, below its --help."""
    help_line = re.compile(r"^(  --help(?: \[GROUP\])? +).+$", re.MULTILINE)
    version = "print the version, and stop"
    show(help_line.sub(lambda m: f"{m[0]}\n{'  --version':<{len(m[1])}}{version}", page, count=1))


@contextmanager
def told_once() -> Iterator[None]:
    """Have what all processes refuse, before they have joined, told by the first one alone."""
    try:
        yield
    except UserError as error:
        if world_size() == 1:
            raise
        # It imports torch, for which one process with a mistake does not wait.
        from mst_train.distributed.init import told_together

        raise told_together(error) from error


def _require_working_folder() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise UserError(
            f"the working folder is gone or closed ({error.strerror}): change to another"
        ) from error


def _is_output_lost() -> bool:
    """Whether what was printed cannot be written; it is then forgotten, or Python itself would try
    again at its end, and fail."""
    try:
        print(flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return True
    return False


def _repair_streams() -> None:
    """Have streams that a run can write to, whatever the shell made of them.

    A file that is opened where one was closed (``2>&-``) would get what is meant for that one. A
    stream that cannot hold a character has its number instead.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - for good
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _tell(what: str, message: str) -> None:
    if message:
        who = f"{process_name()}: " if rank() else ""
        print(f"{who}{what}: {message}", file=sys.stderr)
