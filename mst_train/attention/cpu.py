"""Attention on CPUs.

Legend: B batch, S keys, Q queries of a tile, H query heads, K key-value heads, E head size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mst_train.attention.layouts import (
    backward_by_document,
    forward_by_document,
    heads_first,
    heads_second,
)
from mst_train.attention.mask import Mask
from mst_train.attention.tiled import TiledKernel
from mst_train.mst.attention import PLAIN, Documents, Scores

aten = torch.ops.aten

WINDOW_TILE = 128
"""Queries at a time where there is a window: they compute WINDOW_TILE + window scores each."""


@dataclass(eq=False)
class CpuKernel:
    """Torch's flash attention for CPUs; documents one after the other.

    With a window it is called for a few queries at a time, with a mask. It does not cap scores:
    those are computed in tiles (``TiledKernel``).
    """

    keys_at_once: ClassVar[int] = 1024
    """Their gradients stay in a core's cache: a few percent faster than all at once."""

    scores: Scores = PLAIN

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        if self.scores.softcap is not None:
            return TiledKernel(self.scores).forward(q, k, v, documents, causal)
        if documents is not None:
            return forward_by_document(self, q, k, v, documents)
        if not self._hides(q, k, causal):
            out_BHSE, lse_BHS = aten._scaled_dot_product_flash_attention_for_cpu(
                *heads_first(q, k, v), 0.0, causal, scale=self.scores.scale
            )
            return out_BHSE.transpose(1, 2), lse_BHS
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_dtype)
        for queries, keys, mask_QS in self._window_tiles(q, k):
            result = aten._scaled_dot_product_flash_attention_for_cpu(
                *heads_first(q[:, queries], k[:, keys], v[:, keys]),
                0.0,
                False,
                attn_mask=mask_QS,
                scale=self.scores.scale,
            )
            out[:, queries], lse[:, :, queries] = result[0].transpose(1, 2), result[1]
            del result, mask_QS  # not to be there with the next ones
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.scores.softcap is not None:
            tiled = TiledKernel(self.scores)
            return tiled.backward(dout, q, k, v, out, lse, documents, causal)
        if documents is not None:
            return backward_by_document(self, dout, q, k, v, out, lse, documents)
        if not self._hides(q, k, causal):
            gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *heads_first(dout, q, k, v, out),
                lse.contiguous(),
                0.0,
                causal,
                scale=self.scores.scale,
            )
            return heads_second(gradients)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (
            torch.zeros_like(
                t,
                dtype=torch.promote_types(t.dtype, torch.float32),
                memory_format=torch.contiguous_format,
            )
            for t in (k, v)
        )
        for queries, keys, mask_QS in self._window_tiles(q, k):
            gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *heads_first(
                    dout[:, queries], q[:, queries], k[:, keys], v[:, keys], out[:, queries]
                ),
                lse[:, :, queries].contiguous(),
                0.0,
                False,
                attn_mask=mask_QS,
                scale=self.scores.scale,
            )
            dq[:, queries], some_dk, some_dv = heads_second(gradients)
            dk[:, keys] += some_dk
            dv[:, keys] += some_dv
            del gradients, some_dk, some_dv, mask_QS  # not to be there with the next ones
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def _hides(self, q: Tensor, k: Tensor, causal: bool) -> bool:
        """Whether a query does not see everything before it, or has keys before the first query."""
        window = self.scores.window
        if not causal or window is None:
            return False
        return window < k.shape[1] or q.shape[1] != k.shape[1]

    def _window_tiles(self, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Some queries, the keys that some of them see, and what to add to the scores, [Q, S]."""
        mask = Mask(q.shape[1], k.shape[1], window=self.scores.window)
        for queries, key_tiles in mask.tiles(WINDOW_TILE, None, q):
            for keys in key_tiles:
                yield queries, keys, self._added(mask, queries, keys, q)

    @staticmethod
    def _added(mask: Mask, queries: slice, keys: slice, like: Tensor) -> Tensor:
        added_QS = like.new_zeros(queries.stop - queries.start, keys.stop - keys.start)
        hidden_QS = mask.hidden(queries, keys, like.device)
        return added_QS if hidden_QS is None else added_QS.masked_fill_(hidden_QS, -math.inf)
