"""Attention in tiles by torch's matrix products: everything on every device, in bounded memory.

FlashAttention's loops (Dao et al. 2022) without its fused kernel: for each tile of queries, tiles
of keys one after the other, with a running maximum and sum. Serves where no fused kernel does:
capped scores without flash-attn, windows in fp32 on CUDA.

Legend: B batch, S keys, T queries of a tile, H query heads, K key-value heads, E head size,
G = H/K, R = G*T: the queries of one key-value head.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mst_train.model.layouts import each_document, flat_heads, rows_first
from mst_train.model.mask import Mask
from mst_train.mst.attention import KEYS_AT_ONCE, PLAIN, Documents, Scores

TILES = {"cpu": (128, 1024), "cuda": (1024, 4096)}
"""Queries and keys of a tile, by device type."""


@dataclass(eq=False)
class TiledKernel:
    """Exact in any floating-point type; computed in fp32 at least, also from bf16.

    Memory: four tiles of scores [B, H, T, S], and in the backward the gradients of all keys and
    values given, in fp32 at least.
    """

    keys_at_once: ClassVar[int] = KEYS_AT_ONCE
    scores: Scores = PLAIN

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if documents is not None:
            lse_HN = q.new_empty(q.shape[2], q.shape[0] * q.shape[1], dtype=_wide(q))
            for part, (q_, k_, v_, out_) in each_document(documents, q, k, v, out):
                document_out, lse_HN[:, part] = self.forward(q_, k_, v_)
                out_.copy_(document_out)
            return out, rows_first(lse_HN, q)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=_wide(q))
        mask = Mask(q.shape[1], k.shape[1], causal, self.scores.window)
        for queries in mask.query_tiles(_tile(q)[0], q):
            q_BKRE = _grouped(q[:, queries], k.shape[2])
            lowest = q_BKRE.new_full((*q_BKRE.shape[:3], 1), -math.inf)
            top, total, sums = lowest, torch.zeros_like(lowest), torch.zeros_like(q_BKRE)
            for _, v_BKSE, scores, _ in self._tiles(q_BKRE, k, v, mask, queries):
                new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
                # Queries that have seen no key yet have no maximum.
                finite = new_top.masked_fill(new_top == -math.inf, 0.0)
                weights = scores.sub_(finite).exp_()
                shrink = (top - finite).exp_()
                total = total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
                sums = sums.mul_(shrink).add_(weights @ v_BKSE)
                top = new_top
            out[:, queries] = _merged(sums.div_(total), q[:, queries])
            lse[:, :, queries] = (top + total.log()).view(*lse.shape[:2], -1)
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
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        if documents is not None:
            dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k, v))
            lse_HN = flat_heads(lse)
            for part, (dout_, q_, k_, v_, out_, *places) in each_document(
                documents, dout, q, k, v, out, dq, dk, dv
            ):
                gradients = self.backward(dout_, q_, k_, v_, out_, lse_HN[None, :, part])
                for place, gradient in zip(places, gradients, strict=True):
                    place.copy_(gradient)
            return dq, dk, dv
        dk_BKSE, dv_BKSE = (
            torch.zeros_like(
                t.transpose(1, 2), dtype=_wide(t), memory_format=torch.contiguous_format
            )
            for t in (k, v)
        )
        heads = k.shape[2]
        mask = Mask(q.shape[1], k.shape[1], causal, self.scores.window)
        for queries in mask.query_tiles(_tile(q)[0], q):
            q_BKRE, dout_BKRE, out_BKRE = (_grouped(t[:, queries], heads) for t in (q, dout, out))
            lse_BKR1 = lse[:, :, queries].reshape(*q_BKRE.shape[:3], 1)
            inner_BKR1 = (dout_BKRE * out_BKRE).sum(-1, keepdim=True)
            dq_BKRE = torch.zeros_like(q_BKRE)
            for keys, v_BKSE, scores, slope in self._tiles(q_BKRE, k, v, mask, queries):
                weights = scores.sub_(lse_BKR1).exp_()
                dv_BKSE[:, :, keys] += weights.transpose(-1, -2) @ dout_BKRE
                dscores = (dout_BKRE @ v_BKSE.transpose(-1, -2)).sub_(inner_BKR1).mul_(weights)
                dscores.mul_(slope)
                dq_BKRE += dscores @ _wide_keys(k, keys)
                dk_BKSE[:, :, keys] += dscores.transpose(-1, -2) @ q_BKRE
            dq[:, queries] = _merged(dq_BKRE, q[:, queries])
        return dq, dk_BKSE.transpose(1, 2).to(k.dtype), dv_BKSE.transpose(1, 2).to(v.dtype)

    def _tiles(
        self, q_BKRE: Tensor, k: Tensor, v: Tensor, mask: Mask, queries: slice
    ) -> Iterator["_KeyTile"]:
        """The tiles of keys that a tile of queries sees."""
        scale, softcap = self.scores.scale or 1 / math.sqrt(q_BKRE.shape[-1]), self.scores.softcap
        seen = mask.seen(queries)
        for start in range(seen.start, seen.stop, _tile(k)[1]):
            keys = slice(start, min(start + _tile(k)[1], seen.stop))
            scores = (q_BKRE @ _wide_keys(k, keys).transpose(-1, -2)).mul_(scale)
            slope: Tensor | float = scale
            if softcap is not None:
                capped = scores.div_(softcap).tanh_()
                scores = capped * softcap
                slope = capped.square_().neg_().add_(1.0).mul_(scale)
            hidden_TS = mask.hidden(queries, keys, k.device)
            if hidden_TS is not None:
                by_query = scores.unflatten(2, (-1, hidden_TS.shape[0]))  # [B, K, G, T, S]
                by_query.masked_fill_(hidden_TS, -math.inf)
            yield _KeyTile(keys, _wide_keys(v, keys), scores, slope)


class _KeyTile(NamedTuple):
    """Keys, their values [B, K, S, E], scores [B, K, R, S] and the scores' derivatives by q.k."""

    keys: slice
    v_BKSE: Tensor
    scores: Tensor
    slope: Tensor | float


def _tile(like: Tensor) -> tuple[int, int]:
    return TILES.get(like.device.type, TILES["cuda"])


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _wide_keys(t_BSKE: Tensor, keys: slice) -> Tensor:
    """[B, S, K, E] -> [B, K, S, E] of these keys, in fp32 at least."""
    return t_BSKE[:, keys].transpose(1, 2).to(_wide(t_BSKE))


def _grouped(t_BTHE: Tensor, kv_heads: int) -> Tensor:
    """[B, T, H, E] -> [B, K, R, E] in fp32 at least: query head h reads key-value head h // G."""
    t_BTKGE = t_BTHE.unflatten(2, (kv_heads, -1))
    return t_BTKGE.permute(0, 2, 3, 1, 4).flatten(2, 3).to(_wide(t_BTHE))


def _merged(t_BKRE: Tensor, like: Tensor) -> Tensor:
    """[B, K, R, E] -> [B, T, H, E], T and H as in ``like``."""
    t_BKGTE = t_BKRE.unflatten(2, (-1, like.shape[1]))
    return t_BKGTE.permute(0, 3, 1, 2, 4).reshape(like.shape).to(like.dtype)
