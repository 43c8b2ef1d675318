"""Which keys a query sees, tile by tile.

Legend: Q queries of a tile, S keys of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mst_kernels.backend import is_fake


@dataclass(frozen=True)
class Mask:
    """Queries that are those of the last keys: their own key and those before it, in a window.

    Without ``causal`` every query sees every key.
    """

    queries: int
    keys: int
    causal: bool = True
    window: int | None = None

    def tiles(
        self, queries_at_once: int, keys_at_once: int | None, like: Tensor
    ) -> Iterator[tuple[slice, Iterator[slice]]]:
        """Slices that cover the queries, each with slices that cover the keys that it sees.

        keys_at_once: None: one slice of keys for each of queries. A caller that leaves nothing of
        one tile for the next takes what its largest takes: where ``like`` has no data (a simulated
        step) only those come that may be.
        """
        if is_fake(like):
            yield from self._largest_tiles(queries_at_once, keys_at_once)
            return
        for queries in _slices(0, self.queries, queries_at_once):
            yield queries, self._seen(queries, keys_at_once)

    def hidden(self, queries: slice, keys: slice, device: torch.device) -> Tensor | None:
        """Which of these keys each of these queries does not see, [Q, S]; None: it sees all."""
        if not self._hides(queries, keys):
            return None
        shift = self.keys - self.queries
        own_Q1 = torch.arange(queries.start + shift, queries.stop + shift, device=device)[:, None]
        key_S = torch.arange(keys.start, keys.stop, device=device)
        hidden_QS = key_S > own_Q1
        if self.window is not None:
            hidden_QS |= key_S <= own_Q1 - self.window
        return hidden_QS

    def _seen(self, queries: slice, at_once: int | None) -> Iterator[slice]:
        """The keys that some of these queries see."""
        shift = self.keys - self.queries
        start, stop = 0, self.keys
        if self.causal:
            stop = queries.stop + shift
            if self.window is not None:
                start = max(queries.start + shift - self.window + 1, 0)
        return _slices(start, stop, at_once or stop - start)

    def _hides(self, queries: slice, keys: slice) -> bool:
        if not self.causal:
            return False
        shift = self.keys - self.queries
        first, last = queries.start + shift, queries.stop + shift - 1
        some_after = keys.stop - 1 > first
        some_before = self.window is not None and keys.start <= last - self.window
        return some_after or some_before

    def _largest_tiles(
        self, queries_at_once: int, keys_at_once: int | None
    ) -> Iterator[tuple[slice, Iterator[slice]]]:
        """Of the tiles with as many queries, and with keys to hide or without, that with the most
        keys."""
        largest: dict[tuple[int, bool], tuple[slice, slice]] = {}
        for queries in _slices(0, self.queries, queries_at_once):
            for keys in self._seen(queries, keys_at_once):
                alike = (queries.stop - queries.start, self._hides(queries, keys))
                known = largest.get(alike)
                if known is None or keys.stop - keys.start > known[1].stop - known[1].start:
                    largest[alike] = queries, keys
        for queries, keys in largest.values():
            yield queries, iter([keys])


def _slices(start: int, stop: int, at_once: int) -> Iterator[slice]:
    for first in range(start, stop, at_once):
        yield slice(first, min(first + at_once, stop))
