"""The FlashAttention that torch brings.

Legend: B batch, S sequence, N = B*S, H query heads, K key-value heads, E head size.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mst_train.attention.cuda.packages import window
from mst_train.attention.layouts import flat, flat_heads, rows_first
from mst_train.mst.attention import KEYS_AT_ONCE, PLAIN, Documents, Scores

aten = torch.ops.aten


@dataclass(eq=False)
class TorchFlashKernel:
    """The FlashAttention-2 kernels that torch brings; FlashAttention-3 where torch was given it
    (``torch.nn.attention.activate_flash_attention_impl``). Windows, but no capped scores."""

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
        left, right = window(self.scores, None)
        options = {
            "scale": self.scores.scale,
            "window_size_left": left,
            "window_size_right": right,
        }
        if documents is None:
            lengths = (None, None, q.shape[1], k.shape[1])
            out, lse, *_ = aten._flash_attention_forward(
                q, k, v, *lengths, 0.0, causal, False, **options
            )
            return out, lse
        cu_seqlens, longest = documents.cu_seqlens_on(q.device), documents.longest
        lengths_N = (cu_seqlens, cu_seqlens, longest, longest)
        out_NHE, lse_HN, *_ = aten._flash_attention_forward(
            *flat(q, k, v), *lengths_N, 0.0, True, False, **options
        )
        return out_NHE.view(q.shape), rows_first(lse_HN, q)

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
        # Without dropout the kernel does not read its random state.
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        left, right = window(self.scores, None)
        options = {
            "scale": self.scores.scale,
            "window_size_left": left,
            "window_size_right": right,
        }
        if documents is None:
            lengths = (None, None, q.shape[1], k.shape[1])
            dq, dk, dv = aten._flash_attention_backward(
                dout,
                q,
                k,
                v,
                out,
                lse.contiguous(),
                *lengths,
                0.0,
                causal,
                unused,
                unused,
                **options,
            )
            return dq, dk, dv
        cu_seqlens, longest = documents.cu_seqlens_on(q.device), documents.longest
        lengths_N = (cu_seqlens, cu_seqlens, longest, longest)
        gradients = aten._flash_attention_backward(
            *flat(dout, q, k, v, out),
            flat_heads(lse),
            *lengths_N,
            0.0,
            True,
            unused,
            unused,
            **options,
        )
        dq, dk, dv = (g.view(t.shape) for g, t in zip(gradients, (q, k, v), strict=True))
        return dq, dk, dv
