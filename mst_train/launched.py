"""What the launcher (torchrun) has told this process about itself, in its environment."""

import os
import socket


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


def _number(variable: str, alone: int) -> int:
    """An environment variable of the launcher's; ``alone`` where it started none."""
    return int(os.environ.get(variable) or alone)
