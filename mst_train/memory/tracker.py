"""Live bytes of a piece of code, on any device, counted tensor by tensor and by kind.

A dispatch mode sees every operation, in the forward and in the backward. A storage counts from the
operation that returns it until it is freed; views and in-place results share their input's storage
and count for nothing more. Memory that an operation takes and frees within itself (a workspace) is
not seen.

A storage's kind follows from where it was made. The decoder marks its parts with profiler ranges,
which the mode sees as well (and which name the parts in a profile of torch's):

    parameters   given to ``watch_module``
    gradients    what is in a watched parameter's ``grad``
    optimizer    made in an optimizer's step
    checkpoints  made in a block's forward, and still alive when it is over
    working_set  made in a block while it runs, or in the backward
    head         made in the LM head and its loss
    other        everything else
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = (
    "parameters",
    "gradients",
    "optimizer",
    "checkpoints",
    "working_set",
    "head",
    "other",
)

BLOCK_RANGE = "mst_train::block"
HEAD_RANGE = "mst_train::head"
_RANGE_KINDS = {BLOCK_RANGE: "working_set", HEAD_RANGE: "head", "Optimizer.step#": "optimizer"}


@dataclass
class _Storage:
    size: int
    kind: str


class MemoryTracker(TorchDispatchMode):
    """Context manager that counts the bytes of the tensors created inside it.

    live_bytes: bytes alive now. peak_bytes: the most that were alive at once. breakdown and
    peak_breakdown: the same by kind. Tensors that exist already count where they are given to
    ``watch`` or ``watch_module``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self.breakdown: Counter[str] = Counter()
        self.peak_breakdown: Counter[str] = Counter()
        self._storages: dict[int, _Storage] = {}
        self._ranges: list[tuple[str, list[_Storage]]] = []
        self._hooks: list[Any] = []

    def watch(self, *tensors: Tensor, kind: str = "other") -> None:
        """Count these tensors too, from now on."""
        for tensor in tensors:
            known = self._storages.get(_key(tensor))
            if known is None or known.size == 0:
                self._remember(tensor, tensor.untyped_storage().nbytes(), kind)

    def watch_module(self, module: nn.Module) -> None:
        """Count a module's parameters, and know its gradients from now on."""
        for parameter in module.parameters():
            self.watch(parameter, kind="parameters")
            hook = parameter.register_post_accumulate_grad_hook(self._gradient_arrived)
            self._hooks.append(hook)

    def reset_peak(self) -> None:
        """Forget the peak so far: from here on it is what is alive now, or more."""
        self.peak_bytes = self.live_bytes
        self.peak_breakdown = self.breakdown.copy()

    def __exit__(self, *arguments: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*arguments)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "profiler":
            return self._range(function, args, kwargs)
        for tensor in _tensors((args, kwargs)):
            if _key(tensor) not in self._storages:
                self._remember(tensor, 0, "other")  # it was there before: not made in here
        result = function(*args, **kwargs)
        for tensor in _tensors(result):
            if _key(tensor) not in self._storages:
                self._remember(tensor, tensor.untyped_storage().nbytes(), self._kind())
        return result

    def _range(self, function: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        if function.overloadpacket == torch.ops.profiler._record_function_enter_new:
            self._ranges.append((args[0], []))
        elif self._ranges:
            name, made = self._ranges.pop()
            if name == BLOCK_RANGE:
                for storage in made:
                    self._change_kind(storage, "checkpoints")
        return function(*args, **kwargs)

    def _kind(self) -> str:
        if torch._C._current_graph_task_id() != -1:
            return "working_set"  # in the backward
        for name, _ in reversed(self._ranges):
            for prefix, kind in _RANGE_KINDS.items():
                if name.startswith(prefix):
                    return kind
        return "other"

    def _gradient_arrived(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            storage = self._storages.get(_key(parameter.grad))
            if storage is not None:
                self._change_kind(storage, "gradients")

    def _remember(self, tensor: Tensor, size: int, kind: str) -> None:
        key = _key(tensor)
        if key not in self._storages:
            weakref.finalize(tensor.untyped_storage(), self._forget, key)
        storage = self._storages[key] = _Storage(size, kind)
        for _, made in self._ranges:
            made.append(storage)
        self.live_bytes += size
        self.breakdown[kind] += size
        if self.live_bytes > self.peak_bytes:
            self.reset_peak()

    def _change_kind(self, storage: _Storage, kind: str) -> None:
        self.breakdown[storage.kind] -= storage.size
        self.breakdown[kind] += storage.size
        storage.kind = kind

    def _forget(self, key: int) -> None:
        storage = self._storages.pop(key)
        self.live_bytes -= storage.size
        self.breakdown[storage.kind] -= storage.size
        storage.size = 0


def live_bytes_of(*tensors: Tensor | None) -> int:
    """The bytes of these tensors' storages, each storage once."""
    sizes = {_key(tensor): tensor.untyped_storage().nbytes() for tensor in _tensors(tensors)}
    return sum(sizes.values())


def process_peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: on a GPU its allocator's, else the resident set's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (
        leaf
        for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.device.type != "meta"
    )


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
