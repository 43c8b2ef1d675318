"""Which keys a query sees, tile by tile.

Legend: T queries of a tile, S keys of a tile.
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

    def query_tiles(self, at_once: int, like: Tensor) -> Iterator[slice]:
        """Slices that cover the queries.

        Where ``like`` has no data only the last one, which sees the most: a simulated run then
        allocates what a real one does at its peak.
        """
        first = max(self.queries - at_once, 0) if is_fake(like) else 0
        for start in range(first, self.queries, at_once):
            yield slice(start, min(start + at_once, self.queries))

    def seen(self, queries: slice) -> slice:
        """The keys that some of these queries see."""
        if not self.causal:
            return slice(0, self.keys)
        shift = self.keys - self.queries
        start = 0 if self.window is None else max(queries.start + shift - self.window + 1, 0)
        return slice(start, queries.stop + shift)

    def hidden(self, queries: slice, keys: slice, device: torch.device) -> Tensor | None:
        """Which of these keys each of these queries does not see, [T, S]; None: it sees all."""
        if not self.causal:
            return None
        shift = self.keys - self.queries
        first, last = queries.start + shift, queries.stop + shift - 1
        some_after = keys.stop - 1 > first
        some_before = self.window is not None and keys.start <= last - self.window
        if not (some_after or some_before):
            return None
        own_T1 = torch.arange(first, last + 1, device=device)[:, None]
        key_S = torch.arange(keys.start, keys.stop, device=device)
        hidden_TS = key_S > own_T1
        if self.window is not None:
            hidden_TS |= key_S <= own_T1 - self.window
        return hidden_TS
