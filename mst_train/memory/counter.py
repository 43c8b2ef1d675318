"""What a simulated step does beside holding memory: its operations, counted moment by moment."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mst_train.memory import meta
from mst_train.memory.trace import Moment, Trace
from mst_train.memory.tracker import HOST, MemoryTracker, Storage, in_backward
from mst_train.ranges import BLOCK_RANGE, HEAD_RANGE

aten = torch.ops.aten

Numbers = Mapping[str, float]
LARGE_BYTES = 32 * 2**20
"""From this on, a CPU's allocator (glibc's) takes pages from the system anew each time."""


@dataclass(frozen=True)
class Work:
    """What a step computes and moves on one device.

    product_flops: matrix products outside attention. attention_forward_flops and
    attention_backward_flops: causal halves counted. memory_bytes: read and written by all other
    operations on the device, host_memory_bytes: on the host. link_bytes: copied between them, both
    ways together. large_bytes: of new tensors of 32 MiB and more, for which a CPU's allocator asks
    the system for pages each time. peer_bytes: exchanged with processes of the same machine,
    network_bytes: with those of others, the larger of what goes out and what comes in;
    awaited_peer_bytes and awaited_network_bytes: the part beside which nothing is attended.
    operations: how many were started.
    """

    product_flops: float = 0
    attention_forward_flops: float = 0
    attention_backward_flops: float = 0
    memory_bytes: float = 0
    host_memory_bytes: float = 0
    link_bytes: float = 0
    large_bytes: float = 0
    peer_bytes: float = 0
    network_bytes: float = 0
    awaited_peer_bytes: float = 0
    awaited_network_bytes: float = 0
    operations: float = 0

    @property
    def flops(self) -> float:
        return self.product_flops + self.attention_forward_flops + self.attention_backward_flops


_PRODUCTS = (aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten._grouped_mm)
_LAST = slice(-2, None)
_FACTORS = {aten._grouped_mm: slice(2)}
"""Where an operation's factors are among its tensors, if they are not the last."""
_WITHOUT_WORK = (aten.empty, aten.new_empty, aten.empty_like, aten.detach)
_READ = aten._local_scalar_dense.default
_COPY = aten._to_copy.default
_CPU_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward


class StepCounter(MemoryTracker):
    """Counts work beside memory, moment by moment, and reads every number off the device as 1.

    work: everything that was done, by ``Work``'s names. moments: for each the peak's bytes by kind.
    A moment is the forward of a block, the head, the backward of a block (from the gradients of the
    one before it to its own) or what comes before or after these, in one of the micro-batches.
    trace: what is taken of the device's memory, and given back, in order.
    """

    def __init__(
        self, granularity: int, shares: Mapping[str, float], host_granularity: int = 1
    ) -> None:
        super().__init__(granularity=granularity, host_granularity=host_granularity, shares=shares)
        self._elsewhere = False
        self._tracing = True
        self.reset()

    def reset(self) -> None:
        """Count from here."""
        self.trace = Trace()
        self.reset_peak()
        self.moments: dict[Moment, Numbers] = {}
        self._moment: Moment = (0, "before", 0)
        self.work: dict[str, float] = dict.fromkeys((f.name for f in fields(Work)), 0.0)

    def hold(self, elements: int, dtype: torch.dtype, kind: str) -> Tensor:
        """Memory that is taken as long as this tensor lives, and nothing done with it."""
        large_bytes = self.work["large_bytes"]
        tensor = torch.empty(elements, dtype=dtype, device="meta")
        self.watch(tensor, kind=kind)
        self.work["large_bytes"] = large_bytes
        return tensor

    @contextmanager
    def counted_elsewhere(self) -> Iterator[None]:
        """In this context operations take memory and are not counted."""
        self._elsewhere = True
        try:
            yield
        finally:
            self._elsewhere = False

    def exchange(self, peer_bytes: int, network_bytes: int) -> Callable[[], None]:
        """Bytes begin to travel between processes; returns what to call where they are awaited."""
        travelling = {"peer_bytes": peer_bytes, "network_bytes": network_bytes}
        for name, size in travelling.items():
            self.work[name] += size
        attended = self._attended

        def awaited() -> None:
            if attended == self._attended:
                for name, size in travelling.items():
                    self.work["awaited_" + name] += size

        return awaited

    @property
    def _attended(self) -> tuple[float, float]:
        return self.work["attention_forward_flops"], self.work["attention_backward_flops"]

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """What is taken in this context is not in the trace."""
        self._tracing = False
        try:
            yield
        finally:
            self._tracing = True

    def end_moment(self) -> None:
        """Note the peak since the last moment's end."""
        known = self.moments.get(self._moment)
        if known is None or sum(known.values()) < self.peak_bytes:
            self.moments[self._moment] = dict(self.peak_breakdown)
        self.reset_peak()

    def block_done(self, _: Tensor) -> None:
        """In the backward: a block's gradients are there."""
        micro_batch, phase, block = self._moment
        self._begin(micro_batch, "backward", block + 1 if phase == "backward" else 1)

    def range_entered(self, name: str) -> None:
        micro_batch, phase, block = self._moment
        if in_backward():
            return  # a block that is run again
        if name == BLOCK_RANGE:
            new = phase == "backward"
            self._begin(micro_batch + new, "forward", block + 1 if phase == "forward" else 0)
        elif name == HEAD_RANGE:
            self._begin(micro_batch, "head", 0)

    def range_left(self, name: str) -> None:
        if name == HEAD_RANGE:
            self._begin(self._moment[0], "backward", 0)

    def _begin(self, *moment: Any) -> None:
        host_peak = self.peak_host_bytes
        self.end_moment()
        self.peak_host_bytes = host_peak
        self._moment = moment
        self.trace.begin(self._moment)

    def counts(self, tensor: Tensor) -> bool:
        return tensor.is_meta

    def operation(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function.is_view:
            return function(*args, **kwargs)
        if function.namespace == "profiler":
            return self._range(function, args, kwargs)
        if function is _READ and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else 1
        if function is _COPY and _reads_numbers(args[0], kwargs):
            return torch.ones(args[0].shape, dtype=args[0].dtype)
        result, new, known = meta.call(function, args, kwargs)
        if new is None:
            self._count_new(result, args, kwargs)
        else:
            for tensor, size in new:
                self._remember(tensor, size, self._kind())
        if function.namespace == "aten" and not self._elsewhere:
            self._count_work(function.overloadpacket, args, kwargs, result, known)
        return result

    def _remember(self, tensor: Tensor, size: int, kind: str) -> Storage:
        if size >= LARGE_BYTES and kind != HOST:
            self.work["large_bytes"] += size
        storage = super()._remember(tensor, size, kind)
        if self._tracing and kind != HOST:
            self.trace.allocate(storage, self._held(storage.size, kind))
        return storage

    def _forget(self, key: int) -> None:
        self.trace.free(self._storages[key])
        super()._forget(key)

    def _count_work(
        self,
        operation: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        known: meta.Known | None,
    ) -> None:
        if self.host_bytes or known is None:
            work = self._work_of(operation, args, kwargs, result)
        elif known.work is None:
            work = known.work = self._work_of(operation, args, kwargs, result)
        else:
            work = known.work
        for name, amount in work:
            self.work[name] += amount

    def _work_of(
        self, operation: Any, args: tuple[Any, ...], kwargs: Any, result: Any
    ) -> tuple[tuple[str, float], ...]:
        """An operation's work: that of all with the same forms, where nothing is on the host."""
        if operation in _WITHOUT_WORK:
            return ()
        one = ("operations", 1)
        if operation in _PRODUCTS:
            left, right = [t for t in args if isinstance(t, Tensor)][_FACTORS.get(operation, _LAST)]
            return one, ("product_flops", 2.0 * left.numel() * right.shape[-1])
        if operation is _CPU_ATTENTION:
            return one, ("attention_forward_flops", _cpu_attention_flops(args, any(args[4:5])))
        if operation is _CPU_ATTENTION_BACKWARD:
            flops = 2.5 * _cpu_attention_flops(args[1:], args[7])
            return one, ("attention_backward_flops", flops)
        used = meta.tensors(args, kwargs, result)
        size = sum(t.numel() * t.element_size() for t in used)
        host = [self.on_host(t) for t in used]
        if not any(host):
            return one, ("memory_bytes", size)
        if operation in (aten.copy_, aten._to_copy) and not all(host):
            return one, ("link_bytes", used[0].numel() * used[0].element_size())
        return one, ("host_memory_bytes", size)


def _reads_numbers(tensor: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a copy of a tensor without data is one that a program reads numbers from."""
    return tensor.is_meta and kwargs.get("device") == torch.device("cpu")


def _cpu_attention_flops(tensors: tuple[Any, ...], causal: bool) -> float:
    q_BHSE, k_BKSE = tensors[:2]
    return attention_flops(q_BHSE.transpose(1, 2), k_BKSE.transpose(1, 2), causal)


def attention_flops(
    q_BSHE: Tensor, k_BSKE: Tensor, causal: bool, window: int | None = None
) -> float:
    """Two products over all pairs that see each other; causal queries are the last keys'."""
    batch, queries, heads, size = q_BSHE.shape
    keys = k_BSKE.shape[1]
    pairs = float(queries * keys)
    if causal:
        pairs -= queries * queries / 2
        out_of_sight = max(keys - window, 0) if window else 0  # of the last query
        hidden = min(out_of_sight, queries)
        pairs -= out_of_sight * hidden - hidden * hidden / 2
    return 4.0 * batch * heads * size * pairs
