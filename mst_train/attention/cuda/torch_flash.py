"""The FlashAttention that torch brings.

Legend: B batch, S sequence, N = B*S, H query heads, K key-value heads, E head size.
"""

import torch
from torch import Tensor

from mst_train.attention.cuda.flash import FlashKernel, Packed

aten = torch.ops.aten


class TorchFlashKernel(FlashKernel):
    """The FlashAttention-2 kernels that torch brings; FlashAttention-3 or 4 where torch was given
    it (``torch.nn.attention.activate_flash_attention_impl``). Windows, but no capped scores."""

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, packed: Packed, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, *_lengths(q, k, packed), 0.0, causal, False, **self._options()
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
        # Without dropout the kernel does not read its random state.
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        gradients: tuple[Tensor, ...] = aten._flash_attention_backward(
            *(dout, q, k, v, out, lse, *_lengths(q, k, packed), 0.0, causal, unused, unused),
            **self._options(),
        )
        return gradients

    def _options(self) -> dict[str, object]:
        left, right = self.window(None)
        return {"scale": self.scores.scale, "window_size_left": left, "window_size_right": right}


def _lengths(q: Tensor, k: Tensor, packed: Packed) -> tuple[object, ...]:
    if packed.cu_seqlens is None:
        return None, None, q.shape[1], k.shape[1]
    return packed.lengths
