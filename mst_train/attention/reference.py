"""Attention by the formula: what the other kernels are held to.

Legend: B batch, S sequence, Q queries where they are fewer than the keys, H query heads, K
key-value heads, E head size, G = H/K.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mst_train.attention.mask import Mask
from mst_train.mst.attention import KEYS_AT_ONCE, PLAIN, Documents, Scores


@dataclass(eq=False)
class ReferenceKernel:
    """The formula, in fp32 at least.

    Holds the whole score matrix, [B, H, Q, S], several times.
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
        scores_BKGQS, _ = self._scores(q, k, documents, causal)
        lse_BKGQ = scores_BKGQS.logsumexp(-1)
        weights_BKGQS = (scores_BKGQS - lse_BKGQ[..., None]).exp()
        out_BKGQE = weights_BKGQS @ self._shared(v)
        return self._merged(out_BKGQE, q), lse_BKGQ.flatten(1, 2)

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
        groups = q.shape[2] // k.shape[2]
        lse_BKGQ1 = lse.unflatten(1, (-1, groups))[..., None]
        scores, slope = self._scores(q, k, documents, causal)
        weights = (scores - lse_BKGQ1).exp()  # [B, K, G, Q, S]
        dout_, out_, q_ = (self._grouped(t, groups) for t in (dout, out, q))  # [B, K, G, Q, E]
        dv = (weights.transpose(-1, -2) @ dout_).sum(2)
        dweights = dout_ @ self._shared(v).transpose(-1, -2)
        dscores = weights * (dweights - (dout_ * out_).sum(-1, keepdim=True)) * slope
        dq = dscores @ self._shared(k)
        dk = (dscores.transpose(-1, -2) @ q_).sum(2)
        return self._merged(dq, q), dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)

    def _scores(
        self, q: Tensor, k: Tensor, documents: Documents | None, causal: bool
    ) -> tuple[Tensor, Tensor | float]:
        """The scores [B, K, G, Q, S], and their derivatives by the products of queries and keys."""
        scale, softcap = self.scores.scale or 1 / math.sqrt(q.shape[3]), self.scores.softcap
        q_BKGQE = self._grouped(q, q.shape[2] // k.shape[2])
        scores = q_BKGQE @ self._shared(k).transpose(-1, -2) * scale
        slope: Tensor | float = scale
        if softcap is not None:
            capped = torch.tanh(scores / softcap)
            scores, slope = softcap * capped, scale * (1 - capped.square())
        mask = Mask(q.shape[1], k.shape[1], causal, self.scores.window)
        hidden = mask.hidden(slice(0, mask.queries), slice(0, mask.keys), q.device)
        if documents is not None:
            owner = torch.zeros(q.shape[0] * q.shape[1], dtype=torch.int32, device=q.device)
            for start in documents.offsets[1:-1]:
                owner[start:] += 1
            owner = owner.view(q.shape[0], 1, 1, q.shape[1])
            others = owner[..., :, None] != owner[..., None, :]
            hidden = others if hidden is None else hidden | others
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        return scores, slope

    @staticmethod
    def _grouped(t_BQHE: Tensor, groups: int) -> Tensor:
        """[B, Q, H, E] -> [B, K, G, Q, E]: query head h reads key-value head h // G."""
        t_BQKGE = t_BQHE.unflatten(2, (-1, groups))
        return t_BQKGE.permute(0, 2, 3, 1, 4).to(torch.promote_types(t_BQHE.dtype, torch.float32))

    @staticmethod
    def _shared(t_BSKE: Tensor) -> Tensor:
        """[B, S, K, E] -> [B, K, 1, S, E]."""
        t_BKSE = t_BSKE.transpose(1, 2).to(torch.promote_types(t_BSKE.dtype, torch.float32))
        return t_BKSE.unsqueeze(2)

    @staticmethod
    def _merged(t_BKGQE: Tensor, like: Tensor) -> Tensor:
        """[B, K, G, Q, E] -> [B, Q, H, E]."""
        return t_BKGQE.permute(0, 3, 1, 2, 4).reshape(like.shape).to(like.dtype)
