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

What is made in the range of the host's memory is counted by itself.
"""

import re
import weakref
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mst_train.memory.meta import tensors
from mst_train.mst.on_host import OnHost
from mst_train.ranges import BLOCK_RANGE, HEAD_RANGE, HOST_RANGE, OPTIMIZER_RANGE

KINDS = (
    "parameters",
    "gradients",
    "optimizer",
    "checkpoints",
    "working_set",
    "head",
    "other",
)

HOST = "host"
_OWNERS = {HOST_RANGE: HOST, OPTIMIZER_RANGE: "optimizer", "Optimizer.step#": "optimizer"}
_PARTS = {BLOCK_RANGE: "working_set", HEAD_RANGE: "head"}


class _Reference(weakref.ref[UntypedStorage]):
    """To a storage, with its key."""

    __slots__ = ("key",)
    key: int


@dataclass(eq=False, slots=True)
class Storage:
    size: int
    kind: str
    reference: _Reference


class _Range(NamedTuple):
    """A profiler range. owner: the kind of all that is made in it; part: of what is made in it
    outside a backward."""

    name: str
    owner: str | None
    part: str | None
    made: list[Storage]


class MemoryTracker(TorchDispatchMode):
    """Context manager that counts the bytes of the tensors created inside it.

    live_bytes: bytes alive now. peak_bytes: the most that were alive at once. breakdown and
    peak_breakdown: the same by kind. host_bytes, peak_host_bytes: in the host's memory. Tensors
    that exist already count where they are given to ``watch`` or ``watch_module``.

    Args:
        granularity: every storage takes a multiple of so many bytes, as in an allocator;
            host_granularity: on the host.
        shares: by kind, the share of it that this device holds (1 where none is given).
    """

    def __init__(
        self,
        *,
        granularity: int = 1,
        host_granularity: int = 1,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._granularity = granularity
        self._host_granularity = host_granularity
        self._shares = shares or {}
        self.live_bytes = 0
        self.peak_bytes = 0
        self.host_bytes = 0
        self.peak_host_bytes = 0
        self.breakdown: defaultdict[str, int] = defaultdict(int)
        self.peak_breakdown = self.breakdown.copy()
        self._storages: dict[int, Storage] = {}
        self._ranges: list[_Range] = []
        self._hooks: list[Any] = []

    def watch(self, *tensors: Tensor, kind: str = "other") -> None:
        """Count these tensors too, from now on."""
        for tensor in tensors:
            known = self._storages.get(_key(tensor))
            if known is None or known.size == 0:
                self._remember(tensor, tensor.untyped_storage().nbytes(), kind)
            else:
                self._change_kind(known, kind)

    def watch_module(self, module: nn.Module) -> None:
        """Count a module's parameters, and know its gradients from now on."""
        for parameter in module.parameters():
            self.watch(parameter, kind="parameters")
            hook = parameter.register_post_accumulate_grad_hook(self._gradient_arrived)
            self._hooks.append(hook)

    def reset_peak(self) -> None:
        """Forget the peak so far: from here on it is what is alive now, or more."""
        self.peak_bytes = self.live_bytes
        self.peak_host_bytes = self.host_bytes
        self.peak_breakdown = self.breakdown.copy()

    def range_entered(self, name: str) -> None:
        """A profiler range begins."""

    def range_left(self, name: str) -> None:
        """A profiler range is over."""

    def counts(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory is counted: not where it has only a shape."""
        return tensor.device.type != "meta"

    def on_host(self, tensor: Tensor) -> bool:
        """Whether a tensor was made in the range of the host's memory."""
        storage = self._storages.get(_key(tensor))
        return storage is not None and storage.kind == HOST

    def __exit__(self, *arguments: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*arguments)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and torch's way to say so takes time in every operation."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if OnHost in types:  # what it does is seen: it asks for the same of its values
            return NotImplemented
        return self.operation(function, args, kwargs or {})

    def operation(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation returns, counted."""
        if function.namespace == "profiler":
            return self._range(function, args, kwargs)
        result = function(*args, **kwargs)
        if not function.is_view:
            self._count_new(result, args, kwargs)
        return result

    def _count_new(self, result: Any, *arguments: Any) -> None:
        """Count what an operation has made."""
        new = [t for t in self._counted(result) if _key(t) not in self._storages]
        if new:
            before = {_key(t) for t in self._counted(*arguments)}
            for tensor in new:
                there = _key(tensor) in before  # a storage that is older than the tracking
                size = 0 if there else tensor.untyped_storage().nbytes()
                self._remember(tensor, size, "other" if there else self._kind())

    def _counted(self, *trees: Any) -> list[Tensor]:
        return [t for t in tensors(*trees) if self.counts(t)]

    def _range(self, function: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        if function.overloadpacket == torch.ops.profiler._record_function_enter_new:
            name = args[0]
            outer = self._ranges[-1] if self._ranges else _Range("", None, None, [])
            owner, part = (
                next((kind for start, kind in kinds.items() if name.startswith(start)), None)
                for kinds in (_OWNERS, _PARTS)
            )
            owner = outer.owner if outer.owner == HOST else owner or outer.owner
            self._ranges.append(_Range(name, owner, part or outer.part, []))
            self.range_entered(name)
        elif self._ranges:
            name, _, _, made = self._ranges.pop()
            if name == BLOCK_RANGE and not in_backward():
                for storage in made:
                    self._change_kind(storage, "checkpoints")
            self.range_left(name)
        return function(*args, **kwargs)

    def _kind(self) -> str:
        """The kind of what is made now."""
        _, owner, part, _ = self._ranges[-1] if self._ranges else ("", None, None, None)
        if owner is not None:
            return owner
        return "working_set" if in_backward() else part or "other"

    def _gradient_arrived(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            storage = self._storages.get(_key(parameter.grad))
            if storage is not None:
                self._change_kind(storage, "gradients")

    def _remember(self, tensor: Tensor, size: int, kind: str) -> Storage:
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        known = self._storages.get(key)
        if known is None:
            reference = _Reference(storage, self._gone)
            reference.key = key
        else:
            reference = known.reference
        granularity = self._host_granularity if kind == HOST else self._granularity
        size = -(-size // granularity) * granularity
        new = self._storages[key] = Storage(size, kind, reference)
        for opened in self._ranges:
            opened.made.append(new)
        self._count(size, kind)
        return new

    def _gone(self, reference: _Reference) -> None:
        self._forget(reference.key)

    def _change_kind(self, storage: Storage, kind: str) -> None:
        if storage.kind != HOST:
            self._count(-storage.size, storage.kind)
            storage.kind = kind
            self._count(storage.size, kind)

    def _forget(self, key: int) -> None:
        storage = self._storages.pop(key)
        self._count(-storage.size, storage.kind)
        storage.size = 0

    def _count(self, size: int, kind: str) -> None:
        if kind == HOST:
            self.host_bytes += size
            self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)
            return
        held = self._held(size, kind)
        self.breakdown[kind] += held
        self.live_bytes = live = self.live_bytes + held
        if live > self.peak_bytes:
            self.peak_bytes = live
            self.peak_breakdown = self.breakdown.copy()

    def _held(self, size: int, kind: str) -> int:
        """What of a storage this device holds."""
        share = self._shares.get(kind)
        return size if share is None else int(size * share)


def in_backward() -> bool:
    """Whether autograd is running a backward."""
    return torch._C._current_graph_task_id() != -1


def live_bytes_of(*tensors: Tensor | None) -> int:
    """The bytes of these tensors' storages, each storage once."""
    sizes = {_key(t): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(sizes.values())


def process_peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: on a GPU its allocator's, else the resident set's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure, on Linux, starts at that of the parent process
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
