"""What the implementations of FlashAttention share: packed documents, windows, how they refuse.

Legend: B batch, S sequence, N = B*S, H query heads, K key-value heads, E head size.
"""

import functools
import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mst_train.attention.layouts import flat, flat_heads, rows_first
from mst_train.config import AUTO
from mst_train.errors import UserError
from mst_train.mst.attention import KEYS_AT_ONCE, PLAIN, Documents, Scores


class Packed(NamedTuple):
    """Documents one after the other: where they begin and end [documents + 1], int32, on the
    device, and the longest one's tokens; None where the rows of a batch are whole."""

    cu_seqlens: Tensor | None = None
    longest: int | None = None

    @property
    def lengths(self) -> tuple[object, ...]:
        """Where queries and where keys begin and end, and the most of either."""
        return self.cu_seqlens, self.cu_seqlens, self.longest, self.longest


@dataclass(eq=False)
class FlashKernel(ABC):
    """An ``AttentionKernel`` by functions that take rows [B, S, H, E] or documents [N, H, E]."""

    keys_at_once: ClassVar[int] = KEYS_AT_ONCE
    scores: Scores = PLAIN

    @abstractmethod
    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, packed: Packed, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """The result, as q, and its log-sum-exp [B, H, S] or [H, N] in fp32."""

    @abstractmethod
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
        """The gradients of q, k and v; lse is contiguous."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        if documents is None:
            return self._forward(q, k, v, Packed(), causal)
        q_NHE, k_NKE, v_NKE = flat(q, k, v)
        out_NHE, lse_HN = self._forward(q_NHE, k_NKE, v_NKE, _packed(documents, q), causal)
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
        shapes, packed = (q.shape, k.shape, v.shape), Packed()
        if documents is not None:
            dout, q, k, v, out = flat(dout, q, k, v, out)
            lse, packed = flat_heads(lse), _packed(documents, q)
        gradients = self._backward(dout, q, k, v, out, lse.contiguous(), packed, causal)
        dq, dk, dv = (g.view(shape) for g, shape in zip(gradients, shapes, strict=True))
        return dq, dk, dv

    def window(self, unbounded: int | None) -> tuple[int | None, int | None]:
        """Keys that a query sees to the left and to the right of its own.

        FlashAttention counts them from the last query's key, which is the last one.
        """
        window = self.scores.window
        return (unbounded, unbounded) if window is None else (window - 1, 0)


def _packed(documents: Documents, q: Tensor) -> Packed:
    return Packed(documents.cu_seqlens_on(q.device), documents.longest)


def new_gradients(*tensors: Tensor) -> list[Tensor]:
    """Where gradients of tensors are written, without gaps."""
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


@functools.cache
def import_problem(module: str, package: str, remedy: str) -> str | None:
    """Why a package's module cannot be imported; None: it can.

    A package built for another torch or another CUDA fails in many ways, so any error counts. Tried
    once, however many layers ask.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"the package {package} is not installed ({error}): {remedy}"
    except Exception as error:
        return f"the package {package} cannot be imported ({type(error).__name__}: {error})"
    return None


def refused_head_size(name: str, size: int, accepted: str) -> UserError:
    """The error for heads that a kernel does not compute, which only its first call knows."""
    return UserError(
        f"kernel.attention={name} cannot be used: it computes heads of {accepted}, and the "
        f"model's are of {size}: set kernel.attention={AUTO}"
    )
