"""Live bytes of a piece of code, on any device, counted tensor by tensor.

A dispatch mode sees every operation, in the forward and in the backward. A storage counts from the
operation that returns it until it is freed; views and in-place results share their input's storage
and count for nothing more. Memory that an operation takes and frees within itself (a workspace) is
not seen.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTracker(TorchDispatchMode):
    """Context manager that counts the bytes of the tensors created inside it.

    live_bytes: bytes alive now. peak_bytes: the most that were alive at once. Tensors that exist
    already count where they are given to ``watch``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def watch(self, *tensors: Tensor) -> None:
        """Count these tensors too, from now on."""
        for tensor in tensors:
            if not self._sizes.get(tensor.untyped_storage()._cdata):
                self._remember(tensor, tensor.untyped_storage().nbytes())

    def reset_peak(self) -> None:
        """Forget the peak so far: from here on it is what is alive now, or more."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            if tensor.untyped_storage()._cdata not in self._sizes:
                self._remember(tensor, 0)  # it was there before: not of this block's making
        result = function(*args, **kwargs)
        for tensor in _tensors(result):
            self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._remember(tensor, storage.nbytes())

    def _remember(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        self._sizes[key] = size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


def _tensors(tree: Any) -> list[Tensor]:
    return [
        leaf
        for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.device.type != "meta"
    ]


def live_bytes_of(*tensors: Tensor | None) -> int:
    """The bytes of these tensors' storages, each storage once."""
    sizes = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors if tensor is not None)
    }
    return sum(sizes.values())


def process_peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: on a GPU its allocator's, else the resident set's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
