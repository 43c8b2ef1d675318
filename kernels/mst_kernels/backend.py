"""Which implementation an operation runs: its Triton kernel or its torch twin.

The choice is process-wide and has three values:

    auto     Triton for CUDA tensors where triton imports, torch for everything else
    triton   Triton always; a tensor that Triton cannot take is an error
    torch    torch always

CPU tensors reach a Triton kernel only under Triton's interpreter (``TRITON_INTERPRET=1`` in the
environment before triton is imported), which is how the kernels are tested without a GPU. Triton is
imported when the first kernel runs, and not before.
"""

import functools
import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensor

BACKENDS = ("auto", "triton", "torch")

_log = logging.getLogger(__name__)
_backend = "auto"
_auto_logged = False


def set_backend(name: str) -> None:
    """Choose the implementation for the whole process: ``auto``, ``triton`` or ``torch``.

    Raises ValueError for any other name, and for ``triton`` where triton does not import.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"unknown kernel backend {name!r}: expected one of {', '.join(BACKENDS)}")
    if name == "triton" and not has_triton():
        raise ValueError(
            "kernel backend 'triton' was asked for, but triton cannot be imported: "
            "install triton, or use 'auto' or 'torch'"
        )
    _backend = name


def get_backend() -> str:
    """The name last given to `set_backend`; ``auto`` at first."""
    return _backend


@contextmanager
def backend(name: str) -> Iterator[None]:
    """`set_backend` for the duration of a ``with`` block."""
    previous = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


@functools.cache
def has_triton() -> bool:
    """Whether triton imports."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether the tensor has a shape but no data (FakeTensorMode, or the meta device)."""
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an operation on this tensor runs its Triton kernel.

    Float64 has no Triton kernel, and a tensor without data has nothing to launch on: ``auto``
    takes torch for both. Under an explicit ``triton``, raises ValueError for float64 and for a
    tensor that is not on a GPU (unless Triton's interpreter is on).
    """
    if _backend == "torch" or is_fake(tensor):
        return False
    if _backend == "auto":
        chosen = tensor.is_cuda and tensor.dtype != torch.float64 and has_triton()
        _log_auto_once(tensor, chosen)
        return chosen
    if tensor.dtype == torch.float64:
        raise ValueError(
            "kernel backend 'triton' does not support float64: use 'auto' or 'torch' for it"
        )
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"kernel backend 'triton' needs CUDA tensors, but got one on {tensor.device}: use "
            "'auto' or 'torch', or set TRITON_INTERPRET=1 before Python starts, to run the kernels "
            "in Triton's interpreter"
        )
    return True


def on_device(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Make the tensor's GPU current, since Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _log_auto_once(tensor: torch.Tensor, chosen: bool) -> None:
    global _auto_logged
    if not _auto_logged:
        _auto_logged = True
        _log.info(
            "kernel backend auto: %s for %s tensors of %s",
            "triton" if chosen else "torch",
            tensor.device.type,
            tensor.dtype,
        )
