"""What a step asks the device's allocator for, in order: recorded, and made that of a deeper model.

A trace is cut where a step's moments are (counter.py). In a shallow model's trace every block but
those at its ends stands for one of several that are alike; what these free is found from what it
freed, one or more blocks away.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

Moment = tuple[int, str, int]
"""Micro-batch, phase, block."""


class Handle(NamedTuple):
    """The allocation of this number in a moment, with its size."""

    moment: Moment
    number: int
    size: int


class States(NamedTuple):
    """Sizes of the states that an optimizer makes before its first update and keeps, and the block
    whose parameter each belongs to."""

    sizes: tuple[tuple[int | None, int], ...]


Event = int | Handle | States
"""A size that is allocated, what is freed, or states that are there from now on."""

Request = int | tuple[int, ...]
"""A size that is allocated; -1 - n: the n-th allocation is freed; or sizes that are kept."""


class Trace:
    """Records allocations; each is known by an object that lives as long as it does."""

    def __init__(self) -> None:
        self.parts: dict[Moment, list[Event]] = {}
        self._handles: dict[int, Handle] = {}
        self._numbers: defaultdict[Moment, int] = defaultdict(int)
        self.begin((0, "before", 0))

    def begin(self, moment: Moment) -> None:
        """What comes from here on belongs to this moment."""
        if moment not in self.parts:
            self._moment, self._events = moment, self.parts.setdefault(moment, [])

    def allocate(self, owner: Any, size: int) -> None:
        """``owner`` takes so many bytes; nothing where it takes none."""
        if size:
            moment = self._moment
            self._handles[id(owner)] = Handle(moment, self._numbers[moment], size)
            self._numbers[moment] += 1
            self._events.append(size)

    def free(self, owner: Any) -> None:
        """``owner`` gives its bytes back; nothing where it took none here."""
        handle = self._handles.pop(id(owner), None)
        if handle is not None:
            self._events.append(handle)

    def keep(self, states: Sequence[tuple[int | None, int]]) -> None:
        """States are made here by an optimizer's first update."""
        self._events.append(States(tuple(states)))


@dataclass(frozen=True)
class Depths:
    """Which of a shallow model's blocks stands for which of a deep one's.

    Those at both ends are the same; ``period`` blocks between them are repeated, which has to
    divide what the depths differ by.
    """

    shallow: int
    deep: int
    period: int = 1

    @property
    def middle(self) -> range:
        """The blocks that are repeated."""
        first = (self.shallow - self.period) // 2
        return range(first, first + self.period)

    def alike(self, block: int) -> range:
        """The deep model's blocks that one of the shallow one's stands for."""
        more = self.deep - self.shallow
        if block in self.middle:
            return range(block, block + more + 1, self.period)
        start = block if block < self.middle.start else block + more
        return range(start, start + 1)


def requests(trace: Trace, depths: Depths = Depths(1, 1)) -> list[Request]:
    """The deep model's step, from the shallow one's; as it is, where no depths are given."""
    starts: dict[tuple[int, str, int | None], int] = {}
    found: list[Request] = []
    sizes: list[int] = []

    def number(handle: Handle, block: int | None) -> int:
        batch, phase, _ = handle.moment
        n = starts[batch, phase, block] + handle.number
        assert sizes[n] == handle.size, (handle, block)
        return n

    for moment, block, like in _in_order(trace, depths):
        starts[moment[0], moment[1], block] = len(sizes)
        for event in trace.parts[moment]:
            if isinstance(event, int):
                sizes.append(event)
                found.append(event)
            elif isinstance(event, States):
                found.append(_of_all(event, depths) if like is None else _sizes(event))
            else:
                theirs = _block(event.moment, depths.shallow)
                blocks: Sequence[int | None]
                if theirs is None:
                    blocks = [None]
                elif like is None:
                    blocks = depths.alike(theirs)
                else:
                    assert block is not None
                    blocks = [block + theirs - like]
                found += [-1 - number(event, b) for b in blocks]
    return found


def _block(moment: Moment, layers: int) -> int | None:
    """The block that works at a moment."""
    _, phase, index = moment
    if phase == "backward":
        return layers - 1 - index if index < layers else None
    return index if phase == "forward" else None


def _in_order(trace: Trace, depths: Depths) -> Iterator[tuple[Moment, int | None, int | None]]:
    """Moments of the shallow step, the deep model's block at work, and the shallow one's."""
    group: list[tuple[Moment, int]] = []
    for moment in trace.parts:
        like = _block(moment, depths.shallow)
        if like is None:
            yield moment, None, None
        elif like in depths.middle:
            group.append((moment, like))
            if len(group) == depths.period:
                shifts = range(0, depths.deep - depths.shallow + 1, depths.period)
                for shift in shifts if moment[1] == "forward" else reversed(shifts):
                    for one, block in group:
                        yield one, block + shift, block
                group = []
        else:
            yield moment, depths.alike(like)[0], like


def _of_all(states: States, depths: Depths) -> tuple[int, ...]:
    found: list[int] = []
    for block, entries in groupby(states.sizes, key=lambda entry: entry[0]):
        found += [size for _, size in entries] * (1 if block is None else len(depths.alike(block)))
    return tuple(found)


def _sizes(states: States) -> tuple[int, ...]:
    return tuple(size for _, size in states.sizes)
