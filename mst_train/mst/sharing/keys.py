"""The exchange of keys and values: each node gets those that its queries see, and no others.

Without a window a node's later piece sees all keys before it. With one, each piece sees its own
keys and those of a window before it, which other nodes send where they have them. In the backward
the keys' gradients go the opposite way, in fp32 at least, and are summed where the keys came from.

Legend: B batch, N positions of a node, R keys of a span, K key-value heads, E head size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mst_train.mst.sharing.places import Places
from mst_train.mst.sharing.transport import Transport

Pair = tuple[Tensor, Tensor]
"""Keys and values, or their gradients."""


class Seen(NamedTuple):
    """What a piece's queries see of a node's spans.

    queries: of the node's. span: which of its spans holds all the keys that they see. chunk: the
    piece's place in it.
    """

    queries: slice
    span: int
    chunk: slice


class KeyMap:
    """Which keys the queries of each node see.

    length: of the whole sequence. window: as in ``Scores``.
    """

    def __init__(self, places: Places, length: int, window: int | None) -> None:
        self._node = places.node
        self._pieces = [places.pieces(length, node) for node in range(places.keys)]
        self._spans = [_spans(pieces, window) for pieces in self._pieces]

    @property
    def spans(self) -> list[slice]:
        """The positions of all keys that this node's queries see, ascending."""
        return self._spans[self._node]

    @property
    def seen(self) -> list[Seen]:
        """What each piece of this node sees."""
        found, passed = [], 0
        for piece in self._pieces[self._node]:
            size = piece.stop - piece.start
            index = next(n for n, span in enumerate(self.spans) if piece.stop <= span.stop)
            begin = piece.start - self.spans[index].start
            found.append(Seen(slice(passed, passed + size), index, slice(begin, begin + size)))
            passed += size
        return found

    @property
    def sent(self) -> int:
        """Positions whose keys this node sends to others, once for each of these."""
        return sum(self._travelling(self._node, node) for node in range(len(self._pieces)))

    @property
    def received(self) -> int:
        """Positions whose keys this node gets from others."""
        return sum(self._travelling(node, self._node) for node in range(len(self._pieces)))

    def start(self, own: Pair, transport: Transport) -> Callable[[], list[Pair]]:
        """Fetch what this node's queries see.

        Args:
            own: keys and values at this node's positions, [B, N, K, E] each.

        Returns:
            What waits for them: for each span keys and values, [B, R, K, E] each.
        """
        nodes = range(transport.processes)
        cut: dict[tuple[int, int], list[Tensor]] = {}  # once for all who want the same

        def at(source: slice) -> list[Tensor]:
            place = source.start, source.stop
            if place not in cut:
                cut[place] = [tensor[:, source].contiguous() for tensor in own]
            return cut[place]

        sent = [
            [tensor for move in self._moves(self._node, node) for tensor in at(move.source)]
            for node in nodes
        ]
        found = [(_rows(own[0], span), _rows(own[1], span)) for span in self.spans]
        into = [
            [
                tensor[:, move.place]
                for move in self._moves(node, self._node)
                for tensor in found[move.span]
            ]
            for node in nodes
        ]
        wait = transport.start(sent, into)

        def finish() -> list[Pair]:
            wait()
            return found

        return finish

    def give_back(self, gradients: Sequence[Pair], like: Pair, transport: Transport) -> Pair:
        """Sum the gradients of what ``start`` fetched, where it came from.

        Args:
            gradients: of each span's keys and values, [B, R, K, E] each in fp32 at least.
            like: keys and values at this node's positions, [B, N, K, E] each.

        Returns:
            Their gradients, of their shapes, in the gradients' type.
        """
        nodes, wide = range(transport.processes), gradients[0][0].dtype
        sent = [
            [
                tensor[:, move.place]
                for move in self._moves(node, self._node)
                for tensor in gradients[move.span]
            ]
            for node in nodes
        ]
        moves = [list(self._moves(self._node, node)) for node in nodes]
        others = [[_rows(t, move.source, wide) for move in each for t in like] for each in moves]
        others[transport.rank] = sent[transport.rank]
        transport.start(sent, others)()
        dk, dv = (
            torch.zeros_like(t, dtype=wide, memory_format=torch.contiguous_format) for t in like
        )
        for each, tensors in zip(moves, others, strict=True):
            parts = iter(tensors)
            for move in each:
                for total in (dk, dv):
                    total[:, move.source] += next(parts)
        return dk, dv

    def _travelling(self, source: int, reader: int) -> int:
        moves = () if source == reader else self._moves(source, reader)
        return sum(move.source.stop - move.source.start for move in moves)

    def _moves(self, source: int, reader: int) -> Iterator["_Move"]:
        """What one node has of another's spans."""
        passed = 0
        for piece in self._pieces[source]:
            for index, span in enumerate(self._spans[reader]):
                start, stop = max(piece.start, span.start), min(piece.stop, span.stop)
                if start < stop:
                    yield _Move(
                        slice(passed + start - piece.start, passed + stop - piece.start),
                        index,
                        slice(start - span.start, stop - span.start),
                    )
            passed += piece.stop - piece.start


class _Move(NamedTuple):
    """Positions of a node (``source``), and where they are in a span of a reader (``place``)."""

    source: slice
    span: int
    place: slice


def _spans(pieces: Sequence[slice], window: int | None) -> list[slice]:
    """All keys that these pieces' queries see; where what two see touches, together."""
    spans: list[slice] = []
    for piece in pieces:
        start = 0 if window is None else max(piece.start - window + 1, 0)
        if spans and start <= spans[-1].stop:
            spans[-1] = slice(min(start, spans[-1].start), piece.stop)
        else:
            spans.append(slice(start, piece.stop))
    return spans


def _rows(like: Tensor, positions: slice, dtype: torch.dtype | None = None) -> Tensor:
    """Room for some positions."""
    shape = like.shape[0], positions.stop - positions.start, *like.shape[2:]
    return like.new_empty(shape, dtype=dtype or like.dtype)
