"""Attention as one differentiable operation whose result a block can keep.

Attention's backward reads its result and the log-sum-exp of its scores. Both together are no larger
than the queries, while computing them again costs as much as the forward did: past some 57K tokens,
more than everything else in a Llama3-8B block. Under ``recompute_block`` they are kept and handed
over in the re-run.

Legend: B batch, S sequence, H query heads, K key-value heads, E head size.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from mst_train.mst.autograd import first_order_only
from mst_train.mst.block import current_frame


@dataclass(frozen=True, eq=False)
class Documents:
    """Where packed documents begin and end: attention stays within each.

    boundaries: [documents + 1] int32 on the CPU, from 0 to B*S, ascending; rows of the batch one
    after the other, so that a document may not cross from one row into the next.
    """

    boundaries: Tensor

    @cached_property
    def offsets(self) -> list[int]:
        """The boundaries as numbers."""
        offsets: list[int] = self.boundaries.tolist()
        return offsets

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int((self.boundaries[1:] - self.boundaries[:-1]).max())

    def boundaries_on(self, device: torch.device) -> Tensor:
        """The boundaries on a device, as variable-length kernels take them; copied once."""
        if device not in self._copies:
            self._copies[device] = self.boundaries.to(device, non_blocking=True)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}


class AttentionKernel(Protocol):
    """Causal attention's two passes.

    q, out and dout are [B, S, H, E], k and v [B, S, K, E]; lse is the log-sum-exp of each query's
    scores, in the kernel's own shape. ``documents`` confines attention to each document; None: to
    each row of the batch.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv), each of its input's shape."""
        ...


def attend(
    kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:
    """Causal attention by ``kernel``, differentiable in q, k and v.

    Args:
        q: [B, S, H, E]; k, v: [B, S, K, E], H a multiple of K.
        documents: confines attention to each document.

    Returns:
        [B, S, H, E].

    Memory: saves q, k, v, the result and its log-sum-exp.
    """
    out: Tensor = _Attend.apply(q, k, v, kernel, documents)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernel: AttentionKernel,
        documents: Documents | None,
    ) -> Tensor:
        frame = current_frame()
        kept = frame.take(2) if frame is not None else []
        out, lse = kept or kernel.forward(q, k, v, documents)
        if frame is not None:
            frame.keep(out, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernel, ctx.documents = kernel, documents
        return out

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = ctx.kernel.backward(dout, *ctx.saved_tensors, ctx.documents)
        return dq, dk, dv, None, None
