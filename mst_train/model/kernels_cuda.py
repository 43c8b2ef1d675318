"""Attention on CUDA devices: torch's own kernels, and those of the flash-attn package.

Checked for shapes, and for what they hand to the operators below them, without a device: none of
them has been run on a GPU yet.

Legend: B batch, S sequence, N = B*S, H query heads, K key-value heads, E head size.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mst_train.model.layouts import flat, flat_heads, heads_first, heads_second, rows_first
from mst_train.mst.attention import KEYS_AT_ONCE, PLAIN, Documents, Scores

aten = torch.ops.aten


def _window(scores: Scores, unbounded: int | None) -> tuple[int | None, int | None]:
    """Keys that a query sees to the left and to the right of its own.

    FlashAttention counts them from the last query's key, which is the last one.
    """
    return (unbounded, unbounded) if scores.window is None else (scores.window - 1, 0)


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
        left, right = _window(self.scores, None)
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
        boundaries, longest = documents.boundaries_on(q.device), documents.longest
        lengths_N = (boundaries, boundaries, longest, longest)
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
        left, right = _window(self.scores, None)
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
        boundaries, longest = documents.boundaries_on(q.device), documents.longest
        lengths_N = (boundaries, boundaries, longest, longest)
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


@dataclass(eq=False)
class CudnnKernel:
    """cuDNN's kernels, the fastest in torch on Hopper; documents through TorchFlashKernel.

    Neither windows nor capped scores.
    """

    keys_at_once: ClassVar[int] = KEYS_AT_ONCE
    scores: Scores = PLAIN
    _variable_length: TorchFlashKernel = field(init=False)

    def __post_init__(self) -> None:
        self._variable_length = TorchFlashKernel(self.scores)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        if documents is not None:
            return self._variable_length.forward(q, k, v, documents)
        out_BHSE, lse_BHS1, *_ = aten._scaled_dot_product_cudnn_attention(
            *heads_first(q, k, v), None, True, 0.0, causal, False, scale=self.scores.scale
        )
        return out_BHSE.transpose(1, 2), lse_BHS1.squeeze(-1)

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
            return self._variable_length.backward(dout, q, k, v, out, lse, documents)
        unused = torch.empty((), dtype=torch.int64, device=q.device)
        lengths = (None, None, q.shape[1], k.shape[1])
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            *heads_first(dout, q, k, v, out),
            lse.contiguous().unsqueeze(-1),
            unused,
            unused,
            None,
            *lengths,
            0.0,
            causal,
            scale=self.scores.scale,
        )
        return heads_second(gradients)


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
        boundaries, longest = documents.boundaries_on(q.device), documents.longest
        lengths = (boundaries, boundaries, longest, longest)
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
        boundaries, longest = documents.boundaries_on(q.device), documents.longest
        _flash_attn_varlen_backward(
            *flat(dout, q, k, v, out),
            flat_heads(lse),
            *flat(dq, dk, dv),  # contiguous, so these are views
            *(boundaries, boundaries, longest, longest),
            **options,
        )
        return dq, dk, dv

    def _options(self, q: Tensor, causal: bool) -> dict[str, object]:
        left, right = _window(self.scores, -1)
        return {
            "dropout_p": 0.0,
            "softmax_scale": self.scores.scale or q.shape[-1] ** -0.5,
            "causal": causal,
            "window_size_left": left,
            "window_size_right": right,
            "softcap": self.scores.softcap or 0.0,
            "alibi_slopes": None,
        }
