"""Attention in tiles by torch's matrix products: everything on every device, in bounded memory.

FlashAttention's loops (Dao et al. 2022) without its fused kernel: for each tile of queries, tiles
of keys one after the other, with a running maximum and sum. Serves where no fused kernel does:
capped scores without flash-attn, windows in fp32 on CUDA.

Legend: B batch, S keys, Q queries of a tile, H query heads, K key-value heads, E head size,
G = H/K, R = G*Q: the queries of one key-value head.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mst_train.attention.layouts import backward_by_document, forward_by_document
from mst_train.attention.mask import Mask
from mst_train.mst.attention import KEYS_AT_ONCE, PLAIN, Documents, Scores

TILES = {"cpu": (128, 1024), "cuda": (1024, 4096)}
"""Queries and keys of a tile, by device type."""


@dataclass(eq=False)
class TiledKernel:
    """Exact in any floating-point type; computed in fp32 at least, also from bf16.

    device_type: the kind of device that the tiles are for.

    Memory: four tiles of scores [B, H, Q, S], and in the backward the gradients of all keys and
    values given, in fp32 at least.
    """

    keys_at_once: ClassVar[int] = KEYS_AT_ONCE
    scores: Scores = PLAIN
    device_type: str = "cpu"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        if documents is not None:
            return forward_by_document(self, q, k, v, documents)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=_wide(q))
        mask = Mask(q.shape[1], k.shape[1], causal, self.scores.window)
        for queries, key_tiles in mask.tiles(*TILES[self.device_type], q):
            out[:, queries], lse[:, :, queries] = self._read(q, k, v, mask, queries, key_tiles)
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
        if documents is not None:
            return backward_by_document(self, dout, q, k, v, out, lse, documents)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk_BKSE, dv_BKSE = (
            torch.zeros_like(
                t.transpose(1, 2), dtype=_wide(t), memory_format=torch.contiguous_format
            )
            for t in (k, v)
        )
        mask = Mask(q.shape[1], k.shape[1], causal, self.scores.window)
        for queries, key_tiles in mask.tiles(*TILES[self.device_type], q):
            of_queries = dout[:, queries], q[:, queries], out[:, queries], lse[:, :, queries]
            dq[:, queries] = self._read_backward(
                *of_queries, k, v, dk_BKSE, dv_BKSE, mask, queries, key_tiles
            )
        return dq, dk_BKSE.transpose(1, 2).to(k.dtype), dv_BKSE.transpose(1, 2).to(v.dtype)

    # Each tile has a function of its own, which leaves nothing of it for the next.

    def _read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        queries: slice,
        key_tiles: Iterator[slice],
    ) -> tuple[Tensor, Tensor]:
        """What a tile of queries reads, [B, Q, H, E], and its log-sum-exp, [B, H, Q]."""
        q_BKRE = _grouped(q[:, queries], k.shape[2])
        top = q_BKRE.new_full((*q_BKRE.shape[:3], 1), -math.inf)
        total, sums = torch.zeros_like(top), torch.zeros_like(q_BKRE)
        for keys in key_tiles:
            top = self._add_keys(top, total, sums, q_BKRE, k, v, mask, queries, keys)
        read = _merged(sums.div_(total), q[:, queries])
        return read, top.add_(total.log_()).view(q.shape[0], q.shape[2], -1)

    def _add_keys(
        self,
        top: Tensor,
        total: Tensor,
        sums: Tensor,
        q_BKRE: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        queries: slice,
        keys: slice,
    ) -> Tensor:
        """Adds a tile of keys to the queries' sums; returns their new largest scores."""
        scores, _ = self._scores(q_BKRE, k, mask, queries, keys)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        # Queries that have seen no key yet have no maximum.
        finite = new_top.masked_fill(new_top == -math.inf, 0.0)
        weights = scores.sub_(finite).exp_()
        shrink = (top - finite).exp_()
        total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        sums.mul_(shrink).add_(weights @ _wide_keys(v, keys))
        return new_top

    def _read_backward(
        self,
        dout: Tensor,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
        k: Tensor,
        v: Tensor,
        dk_BKSE: Tensor,
        dv_BKSE: Tensor,
        mask: Mask,
        queries: slice,
        key_tiles: Iterator[slice],
    ) -> Tensor:
        """The gradient of a tile of queries, [B, Q, H, E], where all but k and v are the tile's."""
        q_BKRE, dout_BKRE, out_BKRE = (_grouped(t, k.shape[2]) for t in (q, dout, out))
        lse_BKR1 = lse.reshape(*q_BKRE.shape[:3], 1)
        inner_BKR1 = (dout_BKRE * out_BKRE).sum(-1, keepdim=True)
        del out_BKRE
        dq_BKRE = torch.zeros_like(q_BKRE)
        for keys in key_tiles:
            scores, slope = self._scores(q_BKRE, k, mask, queries, keys)
            weights = scores.sub_(lse_BKR1).exp_()
            dv_BKSE[:, :, keys] += weights.transpose(-1, -2) @ dout_BKRE
            dscores = dout_BKRE @ _wide_keys(v, keys).transpose(-1, -2)
            dscores.sub_(inner_BKR1).mul_(weights).mul_(slope)
            dq_BKRE += dscores @ _wide_keys(k, keys)
            dk_BKSE[:, :, keys] += dscores.transpose(-1, -2) @ q_BKRE
            del scores, slope, weights, dscores
        return _merged(dq_BKRE, q)

    def _scores(
        self, q_BKRE: Tensor, k: Tensor, mask: Mask, queries: slice, keys: slice
    ) -> tuple[Tensor, Tensor | float]:
        """The scores of a tile, [B, K, R, S], and their derivatives by q.k."""
        scale, softcap = self.scores.scale or 1 / math.sqrt(q_BKRE.shape[-1]), self.scores.softcap
        scores = (q_BKRE @ _wide_keys(k, keys).transpose(-1, -2)).mul_(scale)
        slope: Tensor | float = scale
        if softcap is not None:
            capped = scores.div_(softcap).tanh_()
            scores = capped * softcap
            slope = capped.square_().neg_().add_(1.0).mul_(scale)
        hidden_QS = mask.hidden(queries, keys, k.device)
        if hidden_QS is not None:
            by_query = scores.unflatten(2, (-1, hidden_QS.shape[0]))  # [B, K, G, Q, S]
            by_query.masked_fill_(hidden_QS, -math.inf)
        return scores, slope


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _wide_keys(t_BSKE: Tensor, keys: slice) -> Tensor:
    """[B, S, K, E] -> [B, K, S, E] of these keys, in fp32 at least."""
    return t_BSKE[:, keys].transpose(1, 2).to(_wide(t_BSKE))


def _grouped(t_BQHE: Tensor, kv_heads: int) -> Tensor:
    """[B, Q, H, E] -> [B, K, R, E] in fp32 at least: query head h reads key-value head h // G."""
    t_BQKGE = t_BQHE.unflatten(2, (kv_heads, -1))
    return t_BQKGE.permute(0, 2, 3, 1, 4).flatten(2, 3).to(_wide(t_BQHE))


def _merged(t_BKRE: Tensor, like: Tensor) -> Tensor:
    """[B, K, R, E] -> [B, Q, H, E], Q and H as in ``like``."""
    t_BKGQE = t_BKRE.unflatten(2, (-1, like.shape[1]))
    return t_BKGQE.permute(0, 3, 1, 2, 4).reshape(like.shape).to(like.dtype)
