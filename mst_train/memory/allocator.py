"""How torch's caching allocator takes memory of a CUDA device: exactly, in address space alone.

After c10/cuda/CUDACachingAllocator.cpp (torch 2.11 to 2.13) and its constants in
c10/core/AllocatorConfig.h, for one stream and none of its options but expandable segments. Requests
are rounded to 512 bytes. Those of at most 1 MiB have a pool of their own. Each pool gives the
smallest free block that is large enough, the one at the lowest address of several, and keeps the
rest of it as another block where that is large enough to be useful. A block that is given back is
merged with its free neighbours.

A pool without such a block takes more from the device. By itself that is a segment for each
request, which goes back only as a whole. With expandable segments there is one range of addresses
for each pool, an eighth longer than the device's memory, in which pages get memory where they are
needed and any free page can go back.

Where the device is full, everything that is free and can go back does, and the request is tried
once more.
"""

from bisect import bisect_left, insort

from mst_train.units import MIB

ROUNDING = 512
SMALLEST_SPLIT = ROUNDING
SMALL_REQUEST = MIB
"""The largest that is served from the small pool; the least that is left over of a large segment
to become a block."""
SMALL_SEGMENT = 2 * MIB
"""A segment of the small pool, and a page of an expandable one."""
LARGE_SEGMENT = 20 * MIB
"""A segment for large requests below ``LARGE_REQUEST``, and a page of an expandable one."""
LARGE_REQUEST = 10 * MIB
LARGE_ROUNDING = 2 * MIB
"""Segments for requests from ``LARGE_REQUEST`` on are multiples of this."""


class DeviceFull(Exception):
    """A request that the device has no memory for: so many bytes are missing."""

    def __init__(self, missing_bytes: int) -> None:
        super().__init__(f"{missing_bytes} bytes are missing")
        self.missing_bytes = missing_bytes


class Block:
    """A range of addresses: in use, free, or without memory (only in an expandable segment)."""

    __slots__ = ("address", "before", "behind", "in_use", "mapped", "pool", "size")

    def __init__(self, pool: "_Pool", address: int, size: int, mapped: bool = True) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.mapped = mapped
        self.in_use = False
        self.before: Block | None = None
        self.behind: Block | None = None

    @property
    def reach(self) -> int:
        """What a free block can be, with the addresses without memory behind it."""
        behind = self.behind
        return self.size + (behind.size if behind is not None and not behind.mapped else 0)


class _Pool:
    """Blocks of one pool that are not in use: free ones by size, unmapped ones by address."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.page = SMALL_SEGMENT if small else LARGE_SEGMENT
        self.free: list[tuple[int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = []
        self.end = 0
        """Addresses from here on have not been used."""

    def extend(self, size: int, mapped: bool = True) -> Block:
        """A segment's first block, in neither list."""
        block = Block(self, self.end, size, mapped)
        self.end += size
        return block

    def add(self, block: Block) -> None:
        if block.mapped:
            insort(self.free, (block.size, block.address, block))
        else:
            insort(self.unmapped, (block.address, block))

    def remove(self, block: Block) -> None:
        if block.mapped:
            del self.free[bisect_left(self.free, (block.size, block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, (block.address,))]

    def merge(self, block: Block) -> None:
        """Grow ``block``, in neither list, by the neighbours that are as it is."""
        other = block.before
        if other is not None and not other.in_use and other.mapped == block.mapped:
            self.remove(other)
            block.address = other.address
            block.size += other.size
            _link(other.before, block)
        other = block.behind
        if other is not None and not other.in_use and other.mapped == block.mapped:
            self.remove(other)
            block.size += other.size
            _link(block, other.behind)


class CachingAllocator:
    """The memory that torch holds of a device.

    Args:
        expandable: whether segments can grow.
        device_bytes: the device's memory, by which expandable segments have their addresses.
        capacity: the most to hold; None: no bound.

    allocated_bytes: of blocks in use. reserved_bytes: taken from the device. peak_...: the most so
    far. retries: how often the device was full and free memory went back.
    """

    def __init__(self, *, expandable: bool, device_bytes: int, capacity: int | None = None) -> None:
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.retries = 0
        self.capacity = capacity
        self._missing_bytes = 0
        self._expandable = expandable
        self._span = device_bytes + device_bytes // 8
        self._small, self._large = _Pool(True), _Pool(False)

    def allocate(self, size: int) -> Block:
        """A block of ``size`` bytes, rounded up; raises DeviceFull."""
        size = max(-(-size // ROUNDING), 1) * ROUNDING
        pool = self._small if size <= SMALL_REQUEST else self._large
        block = self._cached(pool, size) or self._new(pool, size)
        if block is None:
            self.retries += 1
            self.release()
            block = self._new(pool, size)
        if block is None:
            raise DeviceFull(self._missing_bytes)
        left = block.size - size
        if left >= SMALLEST_SPLIT if pool.small or self._expandable else left > SMALL_REQUEST:
            rest = Block(pool, block.address + size, left)
            _link(rest, block.behind)
            _link(block, rest)
            block.size = size
            pool.add(rest)
        block.in_use = True
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return block

    def free(self, block: Block) -> None:
        """Give back a block, once."""
        assert block.in_use
        self.allocated_bytes -= block.size
        block.in_use = False
        block.pool.merge(block)
        block.pool.add(block)

    def release(self) -> None:
        """Give the device all that is free: ``torch.cuda.empty_cache``."""
        for pool in (self._large, self._small):
            for _, _, block in list(pool.free):
                if self._expandable:
                    self._unmap(block)
                elif block.before is None and block.behind is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.size

    def _cached(self, pool: _Pool, size: int) -> Block | None:
        """The best free block, no longer among the free ones."""
        free = pool.free
        found = bisect_left(free, (size,))
        if found == len(free):
            return None
        if self._expandable:  # a block that can grow counts as large as it can become
            while found + 1 < len(free) and free[found + 1][2].reach < free[found][2].reach:
                found += 1
        return free.pop(found)[2]

    def _new(self, pool: _Pool, size: int) -> Block | None:
        """A block of memory that was not held before; None where the device is full."""
        if self._expandable:
            return self._grown(pool, size)
        if pool.small:
            segment = SMALL_SEGMENT
        elif size < LARGE_REQUEST:
            segment = LARGE_SEGMENT
        else:
            segment = _up(size, LARGE_ROUNDING)
        if not self._take(segment):
            return None
        return pool.extend(segment)

    def _take(self, size: int) -> bool:
        if self.capacity is not None and self.reserved_bytes + size > self.capacity:
            self._missing_bytes = self.reserved_bytes + size - self.capacity
            return False
        self.reserved_bytes += size
        if self.reserved_bytes > self.peak_reserved_bytes:
            self.peak_reserved_bytes = self.reserved_bytes
        return True

    # --- expandable segments ----------------------------------------------------------------------

    def _grown(self, pool: _Pool, size: int) -> Block | None:
        """A free block of ``size`` or more at the lowest addresses where one can be made."""
        block = self._room(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            behind = block.behind
            assert behind is not None and not behind.mapped
            if not self._map(behind, min(size - block.size, behind.size)):
                return None
            block = behind
        pool.remove(block)
        return block

    def _room(self, pool: _Pool, size: int) -> Block:
        """The first of neighbouring blocks, none in use, that together have so many addresses."""
        for _, block in pool.unmapped:
            first = block.before if block.before is not None and not block.before.in_use else block
            found = 0
            last: Block | None = first
            while last is not None and not last.in_use and found < size:
                found += last.size
                last = last.behind
            if found >= size:
                return first
        segment = pool.extend(_up(self._span, pool.page), mapped=False)
        pool.add(segment)
        return segment

    def _map(self, block: Block, size: int) -> bool:
        """Give memory to the pages of the first ``size`` bytes of an unmapped block."""
        pool = block.pool
        size = _up(size, pool.page)
        if not self._take(size):
            return False
        pool.remove(block)
        block.mapped = True
        if size < block.size:
            rest = Block(pool, block.address + size, block.size - size, mapped=False)
            _link(rest, block.behind)
            _link(block, rest)
            block.size = size
            pool.add(rest)
        pool.merge(block)
        pool.add(block)
        return True

    def _unmap(self, block: Block) -> None:
        """Give back the whole pages in a free block."""
        pool, end = block.pool, block.address + block.size
        first, last = _up(block.address, pool.page), end // pool.page * pool.page
        if first >= last:
            return
        pool.remove(block)
        if first > block.address:
            rest = Block(pool, block.address, first - block.address)
            _link(block.before, rest)
            _link(rest, block)
            pool.add(rest)
        if last < end:
            rest = Block(pool, last, end - last)
            _link(rest, block.behind)
            _link(block, rest)
            pool.add(rest)
        block.address, block.size, block.mapped = first, last - first, False
        self.reserved_bytes -= block.size
        pool.merge(block)
        pool.add(block)


def _link(before: Block | None, behind: Block | None) -> None:
    if before is not None:
        before.behind = behind
    if behind is not None:
        behind.before = before


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
