"""FlashAttention-2: the package flash-attn.

Legend: B batch, S sequence, N = B*S, H query heads, K key-value heads, E head size.
"""

import torch
from torch import Tensor

from mst_train.attention.cuda.flash import (
    FlashKernel,
    Packed,
    import_problem,
    new_gradients,
)
from mst_train.mst.attention import Scores


def problem(device: torch.device, scores: Scores) -> str | None:
    """Why FlashAttnKernel cannot be used here; None: it can."""
    return import_problem(
        "flash_attn.flash_attn_interface", "flash-attn", "pip install 'mst-train[gpu]'"
    )


class FlashAttnKernel(FlashKernel):
    """The flash-attn package's FlashAttention-2 (2.7 and later): windows and capped scores.

    Through the operators below its autograd functions, which give the log-sum-exp. Head sizes are
    multiples of 8.
    """

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, packed: Packed, causal: bool
    ) -> tuple[Tensor, Tensor]:
        from flash_attn import flash_attn_interface as package

        options = self._options(q, causal) | {"return_softmax": False}
        if packed.cu_seqlens is None:
            out, lse, *_ = package._flash_attn_forward(q, k, v, **options)
        else:
            out, lse, *_ = package._flash_attn_varlen_forward(q, k, v, *packed.lengths, **options)
        return out, lse

    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        packed: Packed,
        causal: bool,
    ) -> tuple[Tensor, ...]:
        from flash_attn import flash_attn_interface as package

        deterministic = torch.are_deterministic_algorithms_enabled()
        options = self._options(q, causal) | {"deterministic": deterministic}
        gradients = new_gradients(q, k, v)
        tensors = (dout, q, k, v, out, lse, *gradients)
        if packed.cu_seqlens is None:
            package._flash_attn_backward(*tensors, **options)
        else:
            package._flash_attn_varlen_backward(*tensors, *packed.lengths, **options)
        return tuple(gradients)

    def _options(self, q: Tensor, causal: bool) -> dict[str, object]:
        left, right = self.window(-1)
        return {
            "dropout_p": 0.0,
            "softmax_scale": self.scores.scale or q.shape[-1] ** -0.5,
            "causal": causal,
            "window_size_left": left,
            "window_size_right": right,
            "softcap": self.scores.softcap or 0.0,
            "alibi_slopes": None,
        }
