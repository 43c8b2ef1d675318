"""FlashAttention-2: the package flash-attn.

Legend: B batch, S sequence, N = B*S, H query heads, K key-value heads, E head size.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mst_train.attention.cuda.packages import import_problem, window
from mst_train.attention.layouts import flat, flat_heads, rows_first
from mst_train.mst.attention import KEYS_AT_ONCE, PLAIN, Documents, Scores


def problem(device: torch.device, scores: Scores) -> str | None:
    """Why FlashAttnKernel cannot be used here; None: it can."""
    return import_problem(
        "flash_attn.flash_attn_interface", "flash-attn", "pip install 'mst-train[gpu]'"
    )


@dataclass(eq=False)
class FlashAttnKernel:
    """The flash-attn package's FlashAttention-2 (2.7 and later): windows and capped scores.

    Through the operators below its autograd functions, which give the log-sum-exp. Head sizes are
    multiples of 8.
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
        from flash_attn.flash_attn_interface import (
            _flash_attn_forward,
            _flash_attn_varlen_forward,
        )

        options = self._options(q, causal) | {"return_softmax": False}
        if documents is None:
            out, lse, *_ = _flash_attn_forward(q, k, v, **options)
            return out, lse
        cu_seqlens, longest = documents.cu_seqlens_on(q.device), documents.longest
        lengths = (cu_seqlens, cu_seqlens, longest, longest)
        out_NHE, lse_HN, *_ = _flash_attn_varlen_forward(*flat(q, k, v), *lengths, **options)
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
        from flash_attn.flash_attn_interface import (
            _flash_attn_backward,
            _flash_attn_varlen_backward,
        )

        deterministic = torch.are_deterministic_algorithms_enabled()
        options = self._options(q, causal) | {"deterministic": deterministic}
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        if documents is None:
            tensors = (dout, q, k, v, out, lse.contiguous(), dq, dk, dv)
            _flash_attn_backward(*tensors, **options)
            return dq, dk, dv
        cu_seqlens, longest = documents.cu_seqlens_on(q.device), documents.longest
        _flash_attn_varlen_backward(
            *flat(dout, q, k, v, out),
            flat_heads(lse),
            *flat(dq, dk, dv),  # contiguous, so these are views
            *(cu_seqlens, cu_seqlens, longest, longest),
            **options,
        )
        return dq, dk, dv

    def _options(self, q: Tensor, causal: bool) -> dict[str, object]:
        left, right = window(self.scores, -1)
        return {
            "dropout_p": 0.0,
            "softmax_scale": self.scores.scale or q.shape[-1] ** -0.5,
            "causal": causal,
            "window_size_left": left,
            "window_size_right": right,
            "softcap": self.scores.softcap or 0.0,
            "alibi_slopes": None,
        }
