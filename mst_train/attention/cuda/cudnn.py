"""cuDNN's attention, as torch calls it.

Legend: B batch, S sequence, H query heads, K key-value heads, E head size.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mst_train.attention.cuda.torch_flash import TorchFlashKernel
from mst_train.attention.layouts import heads_first, heads_second
from mst_train.mst.attention import KEYS_AT_ONCE, PLAIN, Documents, Scores

aten = torch.ops.aten


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
