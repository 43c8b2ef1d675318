"""Torch's caching allocator: its rules on requests whose outcome its source, notes or tests give,
and what holds whatever is asked of it."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mst_train.memory.allocator import CachingAllocator, DeviceFull

KIB, MIB, GIB = 2**10, 2**20, 2**30
PAGE = 20 * MIB


def allocator(expandable=False, capacity=None):
    return CachingAllocator(expandable=expandable, device_bytes=80 * GIB, capacity=capacity)


def taken(sizes, expandable=False):
    """Reserved bytes after these requests."""
    found = allocator(expandable)
    for size in sizes:
        found.allocate(size)
    return found.reserved_bytes


@pytest.mark.parametrize(
    ("requested", "allocated"), [(1, 512), (512, 512), (513, 1024), (MIB + 1, MIB + 512)]
)
@pytest.mark.parametrize("expandable", [False, True])
def test_requests_are_rounded_to_512_bytes(requested, allocated, expandable):
    assert allocator(expandable).allocate(requested).size == allocated


@pytest.mark.parametrize(
    ("sizes", "reserved"),
    [
        ([1], 2 * MIB),
        ([MIB] * 2, 2 * MIB),
        ([MIB] * 3, 4 * MIB),  # torch's test of a pool with two and with three requests of 1 MiB
        ([MIB + 1], 20 * MIB),
        ([10 * MIB - 512] * 2, 20 * MIB),
        ([10 * MIB - 512, 10 * MIB], 20 * MIB),
        ([10 * MIB], 10 * MIB),
        ([10 * MIB + 1], 12 * MIB),
        ([MIB, MIB + 1], 22 * MIB),  # two pools
    ],
)
def test_segments(sizes, reserved):
    assert taken(sizes) == reserved


@pytest.mark.parametrize(
    ("sizes", "reserved"),
    [
        ([1], 2 * MIB),
        ([MIB] * 3, 4 * MIB),
        ([MIB + 1], 20 * MIB),
        ([10 * MIB + 1], 20 * MIB),
        ([21 * MIB, 19 * MIB], 40 * MIB),
        ([21 * MIB, 20 * MIB], 60 * MIB),  # what is free at the end is part of what comes next
        ([10 * MIB] * 6, 60 * MIB),
    ],
)
def test_pages_of_expandable_segments(sizes, reserved):
    assert taken(sizes, expandable=True) == reserved


def test_what_is_left_of_a_large_segment_is_a_block_from_one_mib_on():
    for left, whole in ((MIB, True), (MIB + 512, False)):
        found = allocator()
        found.free(found.allocate(20 * MIB))
        block = found.allocate(20 * MIB - left)
        assert block.size == 20 * MIB - (0 if whole else left)
        assert found.allocated_bytes == block.size


def test_what_is_left_of_other_blocks_is_a_block_always():
    for expandable, size in ((True, 20 * MIB), (False, MIB), (True, MIB)):
        found = allocator(expandable)
        found.free(found.allocate(size))
        assert found.allocate(size - 512).size == size - 512


def holes(found, sizes):
    """Free blocks of these sizes, between others that stay in use."""
    blocks = [(found.allocate(size), found.allocate(12 * MIB)) for size in sizes]
    for block, _ in blocks:
        found.free(block)
    return [block.address for block, _ in blocks]


@pytest.mark.parametrize("expandable", [False, True])
def test_the_smallest_block_that_is_large_enough_is_taken(expandable):
    found = allocator(expandable)
    addresses = holes(found, [60 * MIB, 40 * MIB, 44 * MIB, 40 * MIB])
    assert found.allocate(40 * MIB).address == addresses[1]
    assert found.allocate(40 * MIB).address == addresses[3]
    assert found.allocate(40 * MIB).address == addresses[2]


def test_a_block_that_can_grow_counts_as_large_as_it_can_become():
    """The last one, though it is the smaller."""
    found = allocator(expandable=True)
    first, _, last = (found.allocate(size * MIB) for size in (100, 12, 30))
    found.free(first)
    found.free(last)
    assert found.allocate(25 * MIB).address == first.address


def test_neighbours_are_merged():
    found = allocator(expandable=True)
    blocks = [found.allocate(20 * MIB) for _ in range(3)]
    for index in (0, 2, 1):
        found.free(blocks[index])
    assert found.allocate(60 * MIB).address == 0
    assert found.reserved_bytes == 60 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_a_full_device_is_given_back_what_is_free(expandable):
    """As in torch's test of 120 MiB, taken by three and then by one."""
    found = allocator(expandable, capacity=120 * MIB)
    blocks = [found.allocate(40 * MIB) for _ in range(3)]
    with pytest.raises(DeviceFull) as full:
        found.allocate(40 * MIB)
    assert full.value.missing_bytes == 40 * MIB
    for block in blocks:
        found.free(block)
    assert found.allocate(120 * MIB).size == 120 * MIB
    assert found.peak_reserved_bytes == 120 * MIB


def test_segments_go_back_whole_and_pages_one_by_one():
    """30 MiB in 80 are free, from 15 MiB on: the one page that lies in them can go."""
    for expandable, more in ((False, False), (True, True)):
        found = allocator(expandable, capacity=80 * MIB)
        found.free(found.allocate(80 * MIB))
        blocks = [found.allocate(size * MIB) for size in (15, 30, 35)]
        found.free(blocks[1])
        found.release()
        assert found.reserved_bytes == (80 - 20 * more) * MIB
        if more:  # the page comes back where it was: what is free around it makes 30 MiB again
            assert found.allocate(30 * MIB).address == 15 * MIB
            assert found.reserved_bytes == 80 * MIB


def test_lengths_that_change_leave_gaps_in_segments_that_cannot_grow():
    """The example of torch's note: what a batch of N has left is of no use for N + 1."""
    reserved = []
    for expandable in (False, True):
        found = allocator(expandable)
        for batch in (10, 11):
            blocks = [found.allocate(batch * width * MIB) for width in (3, 5, 3, 5)]
            for block in blocks:
                found.free(block)
        reserved.append(found.reserved_bytes)
    assert reserved == [(160 + 2 * 56) * MIB, 180 * MIB]


SIZES = st.one_of(
    st.integers(1, 2 * MIB), st.integers(MIB, 30 * MIB), st.sampled_from([PAGE, MIB, 10 * MIB])
)
STEPS = st.lists(st.one_of(SIZES, st.floats(0, 1, exclude_max=True)), max_size=80)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(steps=STEPS, expandable=st.booleans(), full=st.booleans())
def test_whatever_is_asked(steps, expandable, full):
    """A size is allocated, a fraction frees one of the blocks in use."""
    capacity = 120 * MIB if full else None
    found = CachingAllocator(expandable=expandable, device_bytes=200 * MIB, capacity=capacity)
    live = []
    for step in steps:
        if isinstance(step, float):
            if live:
                found.free(live.pop(int(step * len(live))))
        else:
            try:
                live.append(found.allocate(step))
            except DeviceFull as error:
                assert full and error.missing_bytes > 0
            else:
                assert live[-1].size >= step
        check(found, live, capacity)
    while live:
        found.free(live.pop())
    check(found, live, capacity)
    assert found.allocated_bytes == 0
    found.release()
    assert found.reserved_bytes == 0


def check(found, live, capacity):
    assert found.allocated_bytes == sum(block.size for block in live)
    assert found.allocated_bytes <= found.reserved_bytes <= found.peak_reserved_bytes
    assert capacity is None or found.peak_reserved_bytes <= capacity
    mapped = 0
    for pool in (found._small, found._large):
        free, unmapped = [b for *_, b in pool.free], [b for *_, b in pool.unmapped]
        assert all(b.mapped and not b.in_use for b in free)
        assert not any(b.mapped or b.in_use for b in unmapped)
        blocks = sorted([*free, *unmapped, *(b for b in live if b.pool is pool)], key=address)
        mapped += sum(b.size for b in blocks if b.mapped)
        for one, other in pairwise(blocks):
            assert one.address + one.size <= other.address
            assert (one.behind is other) == (other.before is one)
            if one.behind is other:
                assert one.address + one.size == other.address
                mergeable = not one.in_use and not other.in_use and one.mapped == other.mapped
                assert not mergeable
        assert all(b.address % pool.page == 0 and b.size % pool.page == 0 for b in unmapped)
    assert mapped == found.reserved_bytes


def address(block):
    return block.address
