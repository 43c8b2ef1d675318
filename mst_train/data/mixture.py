"""Several sources as one, drawn from by weight."""

from mst_train.data.order import pseudo_random
from mst_train.data.packing import Sequence, Sequences

SCALE = 1 << 40
"""Weights become integers, so that every place in the order can be computed exactly."""


class MixedSequences(Sequences):
    """The sequences of all parts, numbered one part after the other.

    Of the first n sequences that a run draws, every part has its share by weight, give or take one
    or two, at every n. Each part goes through epochs of its own, in orders of its own.
    """

    def __init__(self, parts: list[Sequences], weights: list[float]) -> None:
        """``weights``: greater than 0, in any unit."""
        self.sequence_length = parts[0].sequence_length
        self._parts = parts
        self._weights = [max(1, round(SCALE * weight / sum(weights))) for weight in weights]
        # The largest first: what the rounding of one share leaves to the others stays small.
        self._order = sorted(range(len(parts)), key=lambda number: -self._weights[number])

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def __getitem__(self, index: int) -> Sequence:
        number = index
        for part in self._parts:
            if number < len(part):
                return part[number]
            number -= len(part)
        raise IndexError(f"sequence {index} of {len(self)}")

    def drawn(self, position: int, seed: int) -> int:
        number, place = self.part_at(position)
        own_seed = pseudo_random(seed, number)
        return self._start(number) + self._parts[number].drawn(place, own_seed)

    def part_at(self, position: int) -> tuple[int, int]:
        """The part that gives the ``position``-th sequence, and how many it gave before.

        The first part has its share of all positions, rounded, the second its share of the others,
        and so on.
        """
        rest = sum(self._weights)
        for number in self._order[:-1]:
            weight = self._weights[number]
            before, after = (
                (2 * n * weight + rest) // (2 * rest) for n in (position, position + 1)
            )
            if after > before:
                return number, before
            position -= before
            rest -= weight
        return self._order[-1], position

    def spread(self, limit: int) -> list[int]:
        """As of one source; every part has its share of ``limit``, as far as it reaches."""
        shares = [0] * len(self._parts)
        for position in range(min(limit, len(self))):
            shares[self.part_at(position)[0]] += 1
        return [
            self._start(number) + index
            for number, (part, share) in enumerate(zip(self._parts, shares, strict=True))
            for index in (part.spread(share) if share else ())
        ]

    def _start(self, number: int) -> int:
        return sum(len(part) for part in self._parts[:number])
