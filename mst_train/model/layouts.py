"""The layouts that attention's implementations want.

Legend: B batch, S sequence, N = B*S, H heads, E head size.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import Tensor

from mst_train.mst.attention import Documents


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """[B, S, H, E] -> [B, H, S, E], as torch's attention has it."""
    return [t.transpose(1, 2) for t in tensors]


def heads_second(tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors [B, H, S, E] -> [B, S, H, E]."""
    a, b, c = (t.transpose(1, 2) for t in tensors)
    return a, b, c


def flat(*tensors: Tensor) -> list[Tensor]:
    """[B, S, H, E] -> [N, H, E], as variable-length kernels have it."""
    return [t.flatten(0, 1) for t in tensors]


def rows_first(lse_HN: Tensor, q: Tensor) -> Tensor:
    """[H, N] -> [B, H, S], B and S as in q."""
    return lse_HN.unflatten(1, q.shape[:2]).transpose(0, 1)


def flat_heads(lse_BHS: Tensor) -> Tensor:
    """[B, H, S] -> [H, N]."""
    return lse_BHS.transpose(0, 1).flatten(1)


def each_document(documents: Documents, *tensors: Tensor) -> Iterator[tuple[slice, Any]]:
    """Each document's place in the flattened batch, and its part [1, length, H, E] of tensors."""
    # Tensors to write to are contiguous, so that this gives views of them.
    rows = [t.reshape(1, -1, *t.shape[2:]) for t in tensors]
    for start, end in pairwise(documents.offsets):
        part = slice(start, end)
        yield part, [t[:, part] for t in rows]
