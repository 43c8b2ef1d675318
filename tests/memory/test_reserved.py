"""What torch's allocator takes for steps: what they ask for is what is predicted, and a few blocks
stand for many."""

import pytest

from mst_train.cli.compose import compose
from mst_train.memory.allocator import CachingAllocator
from mst_train.memory.devices import find_device
from mst_train.memory.extrapolate import layer_period, traced_layers, with_layers
from mst_train.memory.reserved import replay, reserved_bytes
from mst_train.memory.simulate import simulate
from mst_train.memory.simulated_step import SimulatedStep
from mst_train.memory.trace import Depths, States, requests
from mst_train.units import GIB, MIB

DEVICE = find_device("a100_80gb")
TINY = ["model=llama_tiny", "precision=bf16", "model.num_layers=6", "data.sequence_length=1024"]
TINY += ["memory.block_chunk_tokens=512", "memory.mlp_chunk_tokens=512"]
IN_BACKWARD = ["optimizer.in_backward=true", "optimizer.max_grad_norm=null"]
MASTERS = ["precision=bf16_master"]
LLAMA3 = ["+experiment=llama3_8b_seq60k", "data.sequence_length=24576"]
GEMMA2 = ["+experiment=gemma2_9b_seq36k", "data.sequence_length=9216", "model.num_layers=10"]
SETTINGS = [
    [*TINY, *IN_BACKWARD],
    [*TINY, *MASTERS, "memory.policy=vanilla"],
    [*TINY, "optimizer.name=muon"],
    *(
        pytest.param(settings, marks=pytest.mark.slow)
        for settings in (
            [*TINY, "memory.offload=host", "train.accumulation_steps=3"],
            [*TINY, *MASTERS, "memory.policy=recompute", "optimizer.offload=host"],
            [*LLAMA3],
            [*LLAMA3, "optimizer.name=muon"],
            [*LLAMA3, "memory.offload=host", "memory.keep.attention=all"],
            GEMMA2,
            [*GEMMA2, "memory.offload=host"],
            [*GEMMA2, "optimizer.in_backward=false"],
        )
    ),
]


def replayed(config, shallow):
    """Allocators after the steps, one with segments that grow and one without."""
    step = SimulatedStep.of(config, DEVICE)
    before, trace = step.before(config), step.run(with_layers(config, shallow)).trace
    again = requests(trace, Depths(shallow, config.model.num_layers, layer_period(config.model)))
    found = []
    for expandable in (True, False):
        found.append(CachingAllocator(expandable=expandable, device_bytes=DEVICE.memory_bytes))
        replay(found[-1], before, again)
    return found


@pytest.mark.parametrize("arguments", SETTINGS, ids=" ".join)
def test_a_few_blocks_stand_for_all(arguments):
    """But for numbers of 512 bytes in an update, where each has its own."""
    config = compose(arguments)
    few = replayed(config, traced_layers(config))
    every = replayed(config, config.model.num_layers)
    assert every[0].peak_allocated_bytes == simulate(config, DEVICE).allocated_bytes
    for one, other in zip(few, every, strict=True):
        assert one.peak_reserved_bytes == other.peak_reserved_bytes
        assert one.peak_allocated_bytes == pytest.approx(other.peak_allocated_bytes, abs=2**16)


def test_states_are_made_by_the_first_update():
    """Of a block, in its backward, between what the backward needs; of the rest, likewise."""
    config = compose([*TINY, *IN_BACKWARD, "model.num_layers=2"])
    step = SimulatedStep.of(config, DEVICE)
    before, trace = step.before(config), step.run(config).trace
    kinds = simulate(config, DEVICE).breakdown
    assert sum(size for size in before if size > 0) == kinds["parameters"]
    blocks, sizes = [], 0
    for moment, events in trace.parts.items():
        for event in events:
            if isinstance(event, States):
                assert moment[1] == "backward"
                blocks += [block for block, _ in event.sizes]
                sizes += sum(-(-size // 512) * 512 for _, size in event.sizes)
    assert sizes == kinds["optimizer"]
    assert list(dict.fromkeys(b for b in blocks if b is not None)) == [1, 0]


def test_a_full_device_holds_less_and_a_small_one_runs_out():
    config = compose([*TINY, *IN_BACKWARD, "model.num_layers=2"])
    allocated = simulate(config, DEVICE).allocated_bytes

    def held(capacity):
        return reserved_bytes(config, DEVICE, capacity, expandable=True)

    room = held(80 * GIB)
    assert room > allocated + 20 * MIB
    assert allocated <= held(room - 1) < room
    assert held(allocated // 2) >= allocated


def test_zeros_buffers_are_not_followed():
    config = compose([*TINY, "parallel.zero_stage=1"])
    assert reserved_bytes(config, DEVICE, 80 * GIB, expandable=True, gpus=2) is None
