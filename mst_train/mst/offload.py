"""Kept tensors in host memory, copied while the device computes.

``store`` sends what a block keeps to the host and ``load`` brings it back, beside the computation.
On CUDA, copies run on streams of their own, out of and into pinned buffers. Blocks give up their
tensors in the order of the forward and want them back in the opposite order, so each ``load`` also
starts to bring back what the blocks before it will want. What is wanted more than once, or in
another order, is ``put`` and brought ``back`` by itself (mst/on_host.py).

Buffers are made the first time a size is seen and used again from then on: a step takes what the
step before gave back. Together they never pass the budget.

On a CPU the same code runs with ordinary buffers and copies that are done when they return.
"""

import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mst_train.mst.host_memory import HostMemory

AHEAD = 1
"""How many blocks' tensors are on their way at once, in each direction.

A block computes for longer than its tensors take to travel, at the lengths that need offloading:
one is enough, and each more would hold its tensors on the device."""


class HostBudgetError(RuntimeError):
    """The host buffers would pass their budget."""


class Offload:
    """Sends tensors of one device to host memory and back.

    Args:
        device: the device whose tensors are stored.
        budget_bytes: the most host memory to take; None: no bound.
    """

    def __init__(self, device: torch.device, budget_bytes: int | None = None) -> None:
        cuda = device.type == "cuda"
        self._buffers = HostBuffers(pinned=cuda, budget_bytes=budget_bytes)
        self._copies = _OverlappedCopies(device) if cuda else _ImmediateCopies(device)
        self._order: list[weakref.ref[Stored]] = []
        self._storing = False

    @property
    def host_bytes(self) -> int:
        """Host memory taken so far."""
        return self._buffers.allocated_bytes

    def store(self, tensors: "Sequence[Tensor | Place]") -> "Stored":
        """Start to copy ``tensors`` to the host; the caller may forget them.

        A place among them is one where a tensor waits already.

        Raises HostBudgetError where the budget is too small for all that is stored at once.
        """
        leaving = [(Place(self._buffers, t), t) for t in tensors if isinstance(t, Tensor)]
        self._copies.out(leaving)
        new = (place for place, _ in leaving)
        places = [t if isinstance(t, Place) else next(new) for t in tensors]
        stored = Stored(self, places)
        self._order = [reference for reference in self._order if reference() is not None]
        self._order.append(weakref.ref(stored))
        self._storing = True
        return stored

    def put(self, tensor: Tensor) -> "Place":
        """Start to copy one tensor to the host; the caller may forget it, and not change it.

        Raises HostBudgetError as ``store`` does.
        """
        place = Place(self._buffers, tensor)
        self._copies.out([(place, tensor)])
        return place

    def back(self, places: "Sequence[Place]") -> "Returning":
        """Start to copy what waits in these places to the device. It goes on waiting there."""
        return self._copies.back(places)

    def prefetch(self, stored: "Stored") -> None:
        """Start the copies of ``stored`` and of the ``AHEAD`` blocks stored before it."""
        if self._storing:  # the forward is over: nothing is left to overlap with
            self._copies.forget_leaving(0)
            self._storing = False
        index = next(i for i, reference in enumerate(self._order) if reference() is stored)
        for reference in reversed(self._order[max(index - AHEAD, 0) : index + 1]):
            block = reference()
            if block is not None and block.returning is None:
                block.returning = self._copies.back(block.places)
        del self._order[index]


class Place:
    """Where a tensor waits on the host; the buffer goes back when this object goes.

    left: the event of its copy, on CUDA.
    """

    def __init__(self, buffers: "HostBuffers", tensor: Tensor) -> None:
        self.buffer = buffers.take(tensor)
        self.left: Any = None
        weakref.finalize(self, buffers.give_back, self.buffer)


class Stored:
    """Tensors that wait on the host for their one ``load``."""

    def __init__(self, offload: Offload, places: list[Place]) -> None:
        self.places = places
        self.returning: Returning | None = None
        self._offload = offload

    def load(self) -> list[Tensor]:
        """The tensors on their device, ready for the current stream."""
        self._offload.prefetch(self)
        assert self.returning is not None
        return self.returning.ready()


class HostBuffers:
    """Host memory in buffers that are made once and reused."""

    def __init__(self, *, pinned: bool, budget_bytes: int | None) -> None:
        self.allocated_bytes = 0
        self._memory = HostMemory(pinned=pinned)
        self._budget_bytes = budget_bytes
        self._free: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)

    def take(self, like: Tensor) -> Tensor:
        """A host tensor of ``like``'s shape and type."""
        free = self._free[self._key(like)]
        return free.pop() if free else self._allocate(like)

    def give_back(self, buffer: Tensor) -> None:
        """It is free again."""
        self._free[self._key(buffer)].append(buffer)

    def _allocate(self, like: Tensor) -> Tensor:
        size = self._memory.bytes_for(like.shape, like.dtype)
        if self._budget_bytes is not None and self.allocated_bytes + size > self._budget_bytes:
            self._release_unused()
        if self._budget_bytes is not None and self.allocated_bytes + size > self._budget_bytes:
            raise HostBudgetError(
                f"offloading needs more host memory than its budget of "
                f"{self._budget_bytes / 2**30:.2f} GiB: raise memory.host_budget_gib, shorten "
                f"data.sequence_length, or set memory.keep.attention=0 or memory.offload=none"
            )
        # What has only a shape (a simulated step) waits without memory too.
        buffer = self._memory.empty(like.shape, like.dtype, "meta" if like.is_meta else "cpu")
        self.allocated_bytes += size
        return buffer

    def _release_unused(self) -> None:
        """Give up buffers of sizes that are not in use now."""
        for free in self._free.values():
            self.allocated_bytes -= sum(self._memory.bytes_for(b.shape, b.dtype) for b in free)
            free.clear()

    @staticmethod
    def _key(tensor: Tensor) -> tuple[Any, ...]:
        return tuple(tensor.shape), tensor.dtype


class Returning:
    """Tensors on their way back to the device.

    Args:
        tensors: in memory of the current stream, which must not use it for anything else before
            they are there: where nobody takes them (an error in a backward), it waits for them too.
        arrived: the event to wait for, if any.
    """

    def __init__(self, tensors: list[Tensor], arrived: Any = None) -> None:
        self._tensors = tensors
        self._arrived = arrived
        if arrived is not None:
            wait = torch.cuda.current_stream().wait_event
            self._given_up = weakref.finalize(self, wait, arrived)
            self._given_up.atexit = False

    def ready(self) -> list[Tensor]:
        """The tensors, for the current stream."""
        if self._arrived is not None:
            torch.cuda.current_stream().wait_event(self._arrived)
            self._given_up.detach()
        return self._tensors


class _ImmediateCopies:
    """Copies that are done when they return."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def out(self, leaving: Sequence[tuple[Place, Tensor]]) -> None:
        for place, tensor in leaving:
            place.buffer.copy_(tensor)

    def back(self, places: Sequence[Place]) -> Returning:
        new = (torch.empty_like(place.buffer, device=self._device) for place in places)
        return Returning([t.copy_(place.buffer) for t, place in zip(new, places, strict=True)])

    def forget_leaving(self, but: int) -> None:
        pass


class _OverlappedCopies:
    """Copies that run beside the computation, on one stream in each direction.

    A tensor that is being copied out is held until its copy is done as the current stream sees it:
    the allocator may then use its memory for what the current stream does next. The stream waits
    only for copies that were started ``AHEAD`` blocks ago.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out = torch.cuda.Stream(device)
        self._back = torch.cuda.Stream(device)
        self._leaving: list[tuple[Sequence[tuple[Place, Tensor]], Any]] = []

    def out(self, leaving: Sequence[tuple[Place, Tensor]]) -> None:
        self._out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._out):
            for place, tensor in leaving:
                place.buffer.copy_(tensor, non_blocking=True)
            done = self._out.record_event()
        for place, _ in leaving:
            place.left = done
        self._leaving.append((leaving, done))
        self.forget_leaving(AHEAD)

    def back(self, places: Sequence[Place]) -> Returning:
        # Memory of the current stream: the copies may begin when what it held before is done.
        tensors = [torch.empty_like(place.buffer, device=self._device) for place in places]
        self._back.wait_stream(torch.cuda.current_stream())
        for place in places:
            self._back.wait_event(place.left)
        with torch.cuda.stream(self._back):
            for place, tensor in zip(places, tensors, strict=True):
                tensor.copy_(place.buffer, non_blocking=True)
            arrived = self._back.record_event()
        return Returning(tensors, arrived)

    def forget_leaving(self, but: int) -> None:
        """Wait for what leaves, but for so many of the last, and hold it no longer."""
        while len(self._leaving) > but:
            _, done = self._leaving.pop(0)
            torch.cuda.current_stream().wait_event(done)
