"""Host memory that a GPU copies out of and into by itself: page-locked, in whole pages.

torch's own (``pin_memory=True``) rounds each tensor up to a power of two. Here the pages are the
system's, and CUDA is told to lock them. They are shared with a process that is forked: none of them
is copied then, and CUDA's copies go on reaching this one's.
"""

import ctypes
import logging
import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor
from torch.profiler import record_function

from mst_train.ranges import HOST_RANGE

log = logging.getLogger(__name__)


class HostMemory:
    """Makes tensors in host memory.

    Args:
        pinned: page-locked ones. When that fails a warning says so; that one and all later ones are
            ordinary memory.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._unit = mmap.PAGESIZE if pinned else 1

    def bytes_for(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """What a tensor takes."""
        return -(-shape.numel() * dtype.itemsize // self._unit) * self._unit

    def empty(self, shape: torch.Size, dtype: torch.dtype, home: str = "cpu") -> Tensor:
        """A tensor with no values yet. home: "meta" where it is to have only a shape."""
        with record_function(HOST_RANGE):
            if self._pinned and shape.numel():
                try:
                    return _locked(self.bytes_for(shape, dtype), shape, dtype)
                except (OSError, RuntimeError) as error:
                    log.warning("host memory cannot be pinned (%s): copies will not overlap", error)
                    self._pinned = False
            return torch.empty(shape, dtype=dtype, device=home)


def _locked(size: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor in ``size`` bytes of its own, locked until the last that shares them goes."""
    pages = (ctypes.c_byte * size).from_buffer(mmap.mmap(-1, size))
    address = ctypes.addressof(pages)
    cuda = torch.cuda.cudart()
    code = cuda.cudaHostRegister(address, size, 0)
    if int(code):
        with suppress(RuntimeError):  # CUDA also remembers it, for the next kernel to be blamed
            torch.zeros(1, device="cuda")
        raise RuntimeError(cuda.cudaGetErrorString(code))
    # The end of the process does this by itself.
    weakref.finalize(pages, _unlock, address).atexit = False
    return torch.frombuffer(pages, dtype=dtype, count=shape.numel()).view(shape)


def _unlock(address: int) -> None:
    """Before the pages are the system's again: no copy may be on its way from or to them."""
    with suppress(RuntimeError):  # a GPU that has failed copies nothing
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(address)
