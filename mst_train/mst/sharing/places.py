"""Which positions of a sequence each of several processes has.

P = heads * keys processes. Those that exchange heads follow each other, and together are a *node*
here, which has two *pieces* of the sequence: of 2 * keys pieces, node n has the nth from the start
and the nth from the end. What a causal query sees grows with its position, so that all nodes have
equal work. A node's processes have equal parts of it, in order.

    heads 4, keys 1                            heads 2, keys 2
    | process 0 | 1 | 2 | 3 |                  | 0 | 2 |2 3| 3 | 1 |  <- pieces 0; 1; 2; 3
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Places:
    """One process's place among those that share a sequence.

    heads: processes that exchange heads with each other. keys: nodes of so many processes, which
    exchange keys and values. rank: this process's number among all.
    """

    heads: int = 1
    keys: int = 1
    rank: int = 0

    @property
    def processes(self) -> int:
        return self.heads * self.keys

    @property
    def exchange(self) -> str:
        """What they exchange: heads, keys, or both."""
        if self.keys == 1:
            return "heads"
        return "keys" if self.heads == 1 else "both"

    @property
    def node(self) -> int:
        """This process's node."""
        return self.rank // self.heads

    @property
    def multiple(self) -> int:
        """What a sequence's length has to be a multiple of."""
        return self.processes if self.keys == 1 else math.lcm(self.processes, 2 * self.keys)

    def pieces(self, length: int, node: int) -> list[slice]:
        """The positions of a node in a sequence of ``length``, ascending."""
        if self.keys == 1:
            return [slice(0, length)]
        size = length // (2 * self.keys)
        return [
            slice(piece * size, (piece + 1) * size) for piece in (node, 2 * self.keys - 1 - node)
        ]

    def own(self, length: int) -> list[slice]:
        """The positions of this process in a sequence of ``length``, ascending."""
        share = length // self.processes
        begin = self.rank % self.heads * share
        found, passed = [], 0
        for piece in self.pieces(length, self.node):
            size = piece.stop - piece.start
            start, stop = max(begin - passed, 0), min(begin + share - passed, size)
            if start < stop:
                found.append(slice(piece.start + start, piece.start + stop))
            passed += size
        return found
