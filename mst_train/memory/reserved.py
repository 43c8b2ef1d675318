"""What torch's caching allocator takes of a GPU for a step's tensors: what the step allocates and
frees, in its order, given to a model of the allocator until it takes no more from step to step."""

from collections.abc import Sequence

from mst_train.config import Config
from mst_train.memory.allocator import Block, CachingAllocator, DeviceFull
from mst_train.memory.devices import Device
from mst_train.memory.extrapolate import layer_period, traced_layers, with_layers
from mst_train.memory.simulated_step import SimulatedStep
from mst_train.memory.trace import Depths, Request, Trace, requests

MOST_STEPS = 8
"""A replay that takes more from step to step ends here."""


def reserved_bytes(
    config: Config,
    device: Device,
    capacity: int,
    *,
    expandable: bool,
    gpus: int = 1,
    per_machine: int | None = None,
    trace: Trace | None = None,
) -> int | None:
    """The most that torch's allocator holds in the steps of ``config``, from the first on.

    That is what it takes of a device with room. One that is full is first given back what is free:
    up to ``capacity`` bytes are held then, and more only where that is not enough, so that a result
    beyond ``capacity`` says that memory runs out, and about how much is missing.

    expandable: whether segments can grow. per_machine: as ``simulate`` takes it. None where ZeRO
    shares states out, whose buffers are not followed. A deep model's step is run at its length with
    a few blocks, and what they ask for stands for all; trace: of it, where a simulation has one.
    """
    if gpus > 1 and config.parallel.zero_stage > 0:
        return None
    step = SimulatedStep.of(config, device, gpus=gpus, per_machine=per_machine)
    few = traced_layers(config)
    trace = trace or step.run(with_layers(config, few)).trace
    assert trace is not None
    depths = Depths(few, config.model.num_layers, layer_period(config.model))
    allocator = CachingAllocator(
        expandable=expandable, device_bytes=device.memory_bytes, capacity=capacity
    )
    replay(allocator, step.before(config), requests(trace, depths))
    return allocator.peak_reserved_bytes


def replay(allocator: CachingAllocator, start: Sequence[Request], step: Sequence[Request]) -> None:
    """Do what stays from the start on, and steps until they take no more than those before.

    A capacity that is not enough grows by what is missing.
    """
    _run(allocator, start, first=True)
    for index in range(MOST_STEPS):
        held = allocator.peak_reserved_bytes
        _run(allocator, step, first=index == 0)
        if index and allocator.peak_reserved_bytes == held:
            return


def _run(allocator: CachingAllocator, program: Sequence[Request], first: bool) -> None:
    blocks: list[Block | None] = []
    for request in program:
        if isinstance(request, tuple):
            for size in request if first else ():
                _allocate(allocator, size)
        elif request > 0:
            blocks.append(_allocate(allocator, request))
        else:
            block, blocks[-1 - request] = blocks[-1 - request], None
            assert block is not None
            allocator.free(block)


def _allocate(allocator: CachingAllocator, size: int) -> Block:
    while True:
        try:
            return allocator.allocate(size)
        except DeviceFull as full:
            assert allocator.capacity is not None
            allocator.capacity += full.missing_bytes
