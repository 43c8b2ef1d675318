"""What the launcher (torchrun) has told this process about itself, in its environment."""

import ctypes
import os
import signal
import socket

LAUNCHER = "MST_TRAIN_LAUNCHER"
"""The variable in which launch/torchrun.py names itself, by its process id."""

PR_SET_PDEATHSIG = 1


def world_size() -> int:
    """How many processes were started."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this is; 0 writes what is written once."""
    return _number("RANK", 0)


def local_world_size() -> int:
    """How many of them run on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1)


def local_rank() -> int:
    """Which of those on this machine this is."""
    return _number("LOCAL_RANK", 0)


def process_name() -> str:
    """This process's name in messages."""
    return f"process {rank()} on {socket.gethostname()}"


def end_with_launcher() -> None:
    """Have the kernel kill this process when launch/torchrun.sh, which started it, has ended.

    However that was: a launcher that is killed cannot end its processes any more.
    """
    launcher = os.environ.pop(LAUNCHER, None)  # it is not that of processes started from here
    if launcher is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it had ended before
        os.kill(os.getpid(), signal.SIGKILL)


def on_one_machine() -> bool:
    """Whether all processes run on this machine."""
    return local_world_size() == world_size()


def _number(variable: str, alone: int) -> int:
    """An environment variable of the launcher's; ``alone`` where it started none."""
    return int(os.environ.get(variable) or alone)
