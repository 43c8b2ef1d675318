"""FlashAttention-3 (Shah et al. 2024): the ``hopper`` folder of the flash-attention repository.

Its two operators are called themselves: the Python functions around them have changed their
arguments over time (``window_size`` was a pair), the operators have not. Names and order were read
in hopper/flash_api_stable.cpp at 01d6dd1 and hopper/flash_api.cpp at 0e79d71, the conventions in
hopper/flash_attn_interface.py at 01afd16 and c082294, which calls them. Older packages that
register no operators are refused.

Legend: B batch, S sequence, N = B*S, H query heads, K key-value heads, E head size.
"""

from typing import Any

import torch
from torch import Tensor

from mst_train.attention.cuda.flash import (
    FlashKernel,
    Packed,
    import_problem,
    new_gradients,
    refused_head_size,
)
from mst_train.mst.attention import Scores

REMEDY = (
    "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu128 (or the CUDA that "
    "torch was built for), or build the hopper folder of github.com/Dao-AILab/flash-attention"
)

NOT_GIVEN = dict.fromkeys(
    (
        *("k_new", "v_new", "q_v", "out", "cu_seqlens_k_new", "seqused_q", "seqused_k"),
        *("page_table", "kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin"),
        *("seqlens_rotary", "q_descale", "k_descale", "v_descale", "scheduler_metadata"),
        "pack_gqa",
    )
)
"""Arguments of the forward for generation and fp8; only newer operators have defaults for them."""


def problem(device: torch.device, scores: Scores) -> str | None:
    """Why FlashAttn3Kernel cannot be used here; None: it can."""
    missing = import_problem("flash_attn_3._C", "flash-attn-3", REMEDY)
    if missing:
        return missing
    if not (hasattr(torch.ops.flash_attn_3, "fwd") and hasattr(torch.ops.flash_attn_3, "bwd")):
        return f"this flash-attn-3 registers no operators with torch, so it is too old: {REMEDY}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return "it is for Hopper (compute capability 9.0), and this device has {}.{}".format(
            *capability
        )
    return None


class FlashAttn3Kernel(FlashKernel):
    """FlashAttention-3: windows and capped scores; heads of up to 256, in multiples of 8.

    Memory of the backward besides the gradients: the queries' in fp32, and the keys' and values'
    where heads share them.
    """

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, packed: Packed, causal: bool
    ) -> tuple[Tensor, Tensor]:
        size = q.shape[-1]
        if size % 8 or size > 256:
            raise refused_head_size("flash_attn_3", size, "up to 256, in multiples of 8")
        out, lse, *_ = torch.ops.flash_attn_3.fwd(
            *map(_dense, (q, k, v)),
            **NOT_GIVEN,
            **self._options(q, packed, causal),
            attention_chunk=0,
            is_rotary_interleaved=False,
            num_splits=1,
        )
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
        gradients = new_gradients(q, k, v)
        torch.ops.flash_attn_3.bwd(
            *map(_dense, (dout, q, k, v, out)),
            lse,
            *gradients,
            seqused_q=None,
            seqused_k=None,
            **self._options(q, packed, causal),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return tuple(gradients)

    def _options(self, q: Tensor, packed: Packed, causal: bool) -> dict[str, Any]:
        left, right = self.window(-1)
        return {
            "cu_seqlens_q": packed.cu_seqlens,
            "cu_seqlens_k": packed.cu_seqlens,
            "max_seqlen_q": packed.longest,
            "max_seqlen_k": packed.longest,
            "softmax_scale": self.scores.scale or q.shape[-1] ** -0.5,
            "is_causal": causal,
            "window_size_left": left,
            "window_size_right": right,
            "softcap": self.scores.softcap or 0.0,
            "sm_margin": 0,
        }


def _dense(t: Tensor) -> Tensor:
    """The operators refuse tensors whose last dimension has gaps."""
    return t if t.stride(-1) == 1 else t.contiguous()
