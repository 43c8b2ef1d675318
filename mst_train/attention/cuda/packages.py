"""What the modules of the FlashAttention packages share."""

import functools
import importlib

from mst_train.config import AUTO
from mst_train.errors import UserError
from mst_train.mst.attention import Scores


def window(scores: Scores, unbounded: int | None) -> tuple[int | None, int | None]:
    """Keys that a query sees to the left and to the right of its own.

    FlashAttention counts them from the last query's key, which is the last one.
    """
    return (unbounded, unbounded) if scores.window is None else (scores.window - 1, 0)


@functools.cache
def import_problem(module: str, package: str, remedy: str) -> str | None:
    """Why a package's module cannot be imported; None: it can.

    A package built for another torch or another CUDA fails in many ways, so any error counts. Tried
    once, however many layers ask.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"the package {package} is not installed ({error}): {remedy}"
    except Exception as error:
        return f"the package {package} cannot be imported ({type(error).__name__}: {error})"
    return None


def refused_head_size(name: str, size: int, accepted: str) -> UserError:
    """The error for heads that a kernel does not compute, which only its first call knows."""
    return UserError(
        f"kernel.attention={name} cannot be used: it computes heads of {accepted}, and the "
        f"model's are of {size}: set kernel.attention={AUTO}"
    )
