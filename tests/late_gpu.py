"""A GPU in the place of CUDA's whose work is done late, in any order that its waits allow.

Within ``with LateGpu(schedule) as gpu:`` torch.cuda's streams and events are this GPU's, and
``gpu.tensor`` puts values on it. An operation on its tensors joins the queue of the current stream
and returns. The schedule says who goes on at each moment: the host, or one of the streams whose
first operation waits for nothing that is not done. A wait that is missing becomes a wrong number:

- Memory belongs to the stream it was taken on. When the last tensor in it goes, that stream fills
  it with NaN, after what it was given before, and its next tensor of that size has that memory.
- A copy from or to page-locked host memory reads and writes it when its turn comes; one that comes
  when the memory is locked no longer is an error. One from or to other host memory is over when
  the call returns.
- Whatever the host reads without waiting is as it is at that moment.
"""

import ctypes
import itertools
import mmap
import traceback
from collections import defaultdict, deque
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

aten = torch.ops.aten
CUDA = torch.device("cuda")
UNIT = 512
"""Bytes, of which memory takes a multiple."""

schedules = st.lists(
    st.tuples(st.permutations(range(4)), st.integers(1, 80)), min_size=1, max_size=8
)
"""Stretches of so many moments, and who goes first in each: 0 is the host, n the n-th stream."""


class Work:
    """One operation in a stream's queue."""

    def __init__(self, run, after=None):
        self.run, self.after, self.done = run, after, False

    def may_run(self):
        return self.after is None or self.after.done


class Event:
    """That a stream has come so far; nothing yet before ``record``."""

    def __init__(self, *_, **__):
        self.work = None

    def record(self, stream):
        self.work = stream.put(None)


class Stream:
    """Work in its order, and the memory that was given up in it, by size."""

    def __init__(self, gpu):
        self.gpu, self.queue, self.free = gpu, deque(), defaultdict(list)
        self.turn = 1 + len(gpu.streams) % 3
        gpu.streams.append(self)

    def put(self, run, after=None):
        work = Work(run, after)
        self.queue.append(work)
        return work

    def record_event(self):
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event):
        self.put(None, after=event.work)

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        self.gpu.finish([self])


class Memory:
    """What tensors share; free when the last of them goes."""

    def __init__(self, stream, size):
        free = stream.free[size]
        self.stream, self.size = stream, size
        self.bytes = free.pop() if free else torch.full((size,), 0xFF, dtype=torch.uint8)

    def __del__(self):
        self.stream.put(partial(self.bytes.fill_, 0xFF))  # NaN in any type
        self.stream.free[self.size].append(self.bytes)


class GpuTensor(Tensor):
    """On the GPU, for whoever asks; ``there`` are the values, as they are at the moment."""

    is_cuda, is_meta = True, False
    device = property(lambda self: CUDA)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, memory, there):
        tensor = Tensor._make_wrapper_subclass(
            cls, there.shape, strides=there.stride(), dtype=there.dtype, device="meta"
        )
        tensor.memory, tensor.there = memory, there
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        tensors = args[0] if isinstance(args[0], list) else args
        on_gpu = next(t for t in tensors if isinstance(t, GpuTensor))
        return on_gpu.memory.stream.gpu.operation(function, args, kwargs or {})


class LateGpu:
    """A GPU with its streams; the first is the one that is current at the start.

    Args:
        schedule: one of ``schedules``.
        problem: the code of the error that page-locking memory ends with.
    """

    def __init__(self, schedule, problem=0):
        self.streams: list[Stream] = []
        self.current = Stream(self)
        self.cudart = Cudart(problem)
        self._orders = itertools.chain.from_iterable(
            itertools.repeat(order, moments) for order, moments in itertools.cycle(schedule)
        )
        self._patches = ExitStack()

    def __enter__(self):
        places = {
            "Event": Event,
            "Stream": lambda device=None: Stream(self),
            "cudart": lambda: self.cudart,
            "current_stream": lambda device=None: self.current,
            "stream": self._on,
            "synchronize": lambda device=None: self.finish(self.streams),
        }
        self._patches.enter_context(mock.patch.multiple(torch.cuda, **places))
        made = {name: self._made_by(getattr(torch, name)) for name in ("empty_like", "zeros")}
        self._patches.enter_context(mock.patch.multiple(torch, **made))
        return self

    def __exit__(self, kind, error, frames):
        for stream in self.streams:
            stream.queue.clear()
        traceback.clear_frames(frames)  # what they hold goes while CUDA's names are this GPU's
        self._patches.close()

    def tensor(self, values):
        """A copy of a tensor on the GPU; the host does not wait for it."""
        return self._copy(self.empty(values), values, non_blocking=True)

    def empty(self, like):
        """A tensor of that shape and type: what is in it was another's."""
        bytes_taken = -(-max(like.nbytes, 1) // UNIT) * UNIT
        memory = Memory(self.current, bytes_taken)
        there = memory.bytes.view(like.dtype)[: like.numel()].view(like.shape)
        return GpuTensor(memory, there)

    def operation(self, function, args, kwargs):
        """What an operation returns; its numbers are there when its turn has come."""
        if function is aten.copy_.default:
            return self._copy(*args, **kwargs)
        if function is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            dtype = kwargs.get("dtype") or args[0].dtype
            return self._copy(torch.empty(args[0].shape, dtype=dtype), args[0])
        kwargs.pop("device", None)
        run = partial(function, *map(_value, args), **kwargs)
        if function.is_view:
            return GpuTensor(args[0].memory, run())
        if function._schema.is_mutable:  # in place
            self._put(run)
            return args[0]
        result = self.empty(run())  # of its shape, whatever the numbers are
        if function.overloadpacket not in (aten.empty_like, aten.new_empty):
            values = result.there  # the tensor itself may go before its turn
            self._put(lambda: values.copy_(run()))
        return result

    def finish(self, streams):
        """Let time pass until all that these streams have been given is done."""
        waited_for = [stream.queue[-1] for stream in streams if stream.queue]
        while not all(work.done for work in waited_for):
            self._do(self._first(next(self._orders)))

    def _put(self, run):
        if self.cudart.pending:
            self.cudart.pending, problem = 0, self.cudart.pending
            raise RuntimeError(self.cudart.cudaGetErrorString(problem))
        self.current.put(run)
        while (first := self._first(order := next(self._orders))) is not None:
            if order.index(0) < order.index(first.turn):
                break
            self._do(first)

    def _first(self, order):
        """The stream that goes on; None where each has nothing to do or waits."""
        ready = [s for s in self.streams if s.queue and s.queue[0].may_run()]
        return min(ready, key=lambda stream: order.index(stream.turn), default=None)

    def _do(self, stream):
        work = stream.queue.popleft()
        if work.run is not None:
            work.run()
        work.done = True

    def _copy(self, target, source, non_blocking=False):
        if isinstance(target, GpuTensor) and isinstance(source, GpuTensor):
            self._put(partial(target.there.copy_, source.there))
            return target
        out = isinstance(source, GpuTensor)
        host, there = (target, source.there) if out else (source, target.there)
        locked = self.cudart.find(host.data_ptr())
        if locked:  # by its address: a copy on its way keeps no memory
            at = partial(self.cudart.tensor, locked, host.data_ptr(), host.shape, host.dtype)
            self._put((lambda: at().copy_(there)) if out else (lambda: there.copy_(at())))
        else:
            self._put(partial(host.copy_, there) if out else partial(there.copy_, host.clone()))
        if (out and not locked) or not non_blocking:
            self.current.synchronize()
        return target

    def _made_by(self, function):
        def make(*args, device=None, **kwargs):
            if device is None or torch.device(device).type != "cuda":
                return function(*args, **kwargs, device=device)
            values = function(*args, **kwargs)
            return self.empty(values) if "empty" in function.__name__ else self.tensor(values)

        return make

    @contextmanager
    def _on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class Cudart:
    """What is used of torch.cuda.cudart().

    locked: the addresses of page-locked host memory, each piece by its first. peak_bytes: the most
    that were locked at once.
    """

    def __init__(self, problem):
        self.problem, self.pending = problem, 0
        self.locked: dict[int, range] = {}
        self.peak_bytes = 0

    @property
    def locked_bytes(self):
        return sum(map(len, self.locked.values()))

    def cudaHostRegister(self, address, size, flags):
        assert (address % mmap.PAGESIZE, size % mmap.PAGESIZE, flags) == (0, 0, 0)
        assert self.find(address) is None
        self.pending = self.problem
        if not self.problem:
            self.locked[address] = range(address, address + size)
            self.peak_bytes = max(self.peak_bytes, self.locked_bytes)
        return self.problem

    def cudaHostUnregister(self, address):
        if address not in self.locked:
            return 713
        ctypes.string_at(address, len(self.locked.pop(address)))  # the pages must still be there
        return 0

    def cudaGetErrorString(self, code):
        return f"error {code} of CUDA's"

    def find(self, address):
        """The piece that an address is in; None where it is in none."""
        return next((piece for piece in self.locked.values() if address in piece), None)

    def tensor(self, piece, address, shape, dtype):
        """What is at an address in a piece that must still be locked."""
        gone = self.locked.get(piece.start) is not piece
        assert not gone, "a copy from or to host memory that is gone"
        values = (ctypes.c_byte * (shape.numel() * dtype.itemsize)).from_address(address)
        return torch.frombuffer(values, dtype=dtype).view(shape)


def _value(argument):
    """As an operation takes it: a number from the host comes with it."""
    if isinstance(argument, GpuTensor):
        return argument.there
    if isinstance(argument, Tensor):
        assert argument.dim() == 0, "a tensor of the host's"
        return argument.clone()
    return list(map(_value, argument)) if isinstance(argument, list | tuple) else argument
