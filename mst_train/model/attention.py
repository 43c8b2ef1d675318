"""Causal self-attention: one interface, several backends.

An attention takes queries, keys and values and returns what the queries read:

    q [B, S, H, E], k [B, S, K, E], v [B, S, K, E]  ->  [B, S, H, E]

with H a multiple of K: query heads share key-value heads in groups of H/K. Every query sees itself
and what lies before it, in its document where documents are given and in its row otherwise. Scores
are scaled by 1/sqrt(E).

Backends that are kernels (``AttentionKernel``) give their log-sum-exp, so that a block can keep
their result; the others are computed again where a block is.

    cpu         torch's flash attention for CPUs, fp64 included
    torch_flash the FlashAttention-2 in torch: CUDA, fp16 and bf16
    cudnn       cuDNN's: CUDA, fp16 and bf16; variable lengths through torch_flash
    flash_attn  the flash-attn package: CUDA, fp16 and bf16; not a kernel
    sdpa        what torch chooses; not a kernel
    reference   the formula; holds the whole score matrix

The CUDA backends have been checked for shapes alone: they have not been run on a GPU yet.

Legend: B batch, S sequence, N = B*S, H query heads, K key-value heads, E head size, G = H/K.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_train.errors import UserError
from mst_train.mst.attention import AttentionKernel, Documents, attend

aten = torch.ops.aten


class Attention(Protocol):
    """What the decoder calls; sequence-parallel attention has the same form."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> Tensor: ...


def select_attention(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """The backend of this name for tensors of this device and type.

    "auto" is cpu on a CPU; on CUDA cudnn from Hopper on, torch_flash before, and sdpa for fp32.
    Raises UserError where the backend asked for cannot work here.
    """
    if name == "auto":
        name = _automatic(device, dtype)
    problem = _problem(name, device, dtype)
    if problem:
        raise UserError(f"kernel.attention={name} cannot be used: {problem}")
    if name in KERNELS:
        return KernelAttention(KERNELS[name]())
    return {"flash_attn": flash_attn_attention, "sdpa": sdpa_attention}[name]


def _automatic(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return "cpu"
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa"
    return "cudnn" if torch.cuda.get_device_capability(device) >= (9, 0) else "torch_flash"


def _problem(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if name == "cpu" and device.type != "cpu":
        return f"it runs on the CPU, and this run's device is {device.type}"
    if name not in ("torch_flash", "cudnn", "flash_attn"):
        return None
    if device.type != "cuda":
        return f"it runs on CUDA devices, and this run's device is {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "it computes in bf16: set precision=bf16 or precision=bf16_master"
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed: pip install 'mst-train[gpu]'"
    return None


# --- kernels -------------------------------------------------------------------------------------


class CpuKernel:
    """Torch's flash attention for CPUs; documents one after the other."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        if documents is None:
            out_BHSE, lse_BHS = aten._scaled_dot_product_flash_attention_for_cpu(
                *_heads_first(q, k, v), 0.0, causal
            )
            return out_BHSE.transpose(1, 2), lse_BHS
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse_dtype = torch.promote_types(q.dtype, torch.float32)
        lse_HN = q.new_empty(q.shape[2], q.shape[0] * q.shape[1], dtype=lse_dtype)
        for part, (q_, k_, v_, out_) in _each_document(documents, q, k, v, out):
            document_out, lse_HN[:, part] = self.forward(q_, k_, v_)
            out_.copy_(document_out)
        return out, _rows_first(lse_HN, q)

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
        if documents is None:
            gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *_heads_first(dout, q, k, v, out), lse.contiguous(), 0.0, causal
            )
            return _heads_second(gradients)
        lse_HN = _flat_heads(lse)
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        for part, (dout_, q_, k_, v_, out_, *places) in _each_document(
            documents, dout, q, k, v, out, dq, dk, dv
        ):
            gradients = self.backward(dout_, q_, k_, v_, out_, lse_HN[None, :, part])
            for place, gradient in zip(places, gradients, strict=True):
                place.copy_(gradient)
        return dq, dk, dv


class TorchFlashKernel:
    """The FlashAttention-2 kernels that torch brings."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        if documents is None:
            out_BHSE, lse, *_ = aten._scaled_dot_product_flash_attention(
                *_heads_first(q, k, v), 0.0, causal, False
            )
            return out_BHSE.transpose(1, 2), lse
        boundaries, longest = documents.boundaries_on(q.device), documents.longest
        out_NHE, lse_HN, *_ = aten._flash_attention_forward(
            *_flat(q, k, v), boundaries, boundaries, longest, longest, 0.0, True, False
        )
        return out_NHE.view(q.shape), _rows_first(lse_HN, q)

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
        if documents is None:
            lengths = (None, None, q.shape[1], k.shape[1])
            gradients = aten._scaled_dot_product_flash_attention_backward(
                *_heads_first(dout, q, k, v, out),
                lse.contiguous(),
                *lengths,
                0.0,
                causal,
                unused,
                unused,
            )
            return _heads_second(gradients)
        boundaries, longest = documents.boundaries_on(q.device), documents.longest
        flat = aten._flash_attention_backward(
            *_flat(dout, q, k, v, out),
            _flat_heads(lse),
            boundaries,
            boundaries,
            longest,
            longest,
            0.0,
            True,
            unused,
            unused,
        )
        dq, dk, dv = (g.view(t.shape) for g, t in zip(flat, (q, k, v), strict=True))
        return dq, dk, dv


class CudnnKernel:
    """cuDNN's kernels, the fastest in torch on Hopper; documents through TorchFlashKernel."""

    def __init__(self) -> None:
        self._variable_length = TorchFlashKernel()

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
            *_heads_first(q, k, v), None, True, 0.0, causal, False
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
            *_heads_first(dout, q, k, v, out),
            lse.contiguous().unsqueeze(-1),
            unused,
            unused,
            None,
            *lengths,
            0.0,
            causal,
        )
        return _heads_second(gradients)


class ReferenceKernel:
    """The formula, in fp32 at least: what the others are held to.

    Holds the whole score matrix, [B, H, S, S].
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        scores_BKGSS = self._scores(q, k, documents, causal)
        lse_BKGS = scores_BKGSS.logsumexp(-1)
        weights_BKGSS = (scores_BKGSS - lse_BKGS[..., None]).exp()
        out_BKGSE = weights_BKGSS @ self._shared(v)
        return self._merged(out_BKGSE, q), lse_BKGS.flatten(1, 2)

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
        groups, scale = q.shape[2] // k.shape[2], 1 / math.sqrt(q.shape[3])
        lse_BKGS1 = lse.unflatten(1, (-1, groups))[..., None]
        weights = (self._scores(q, k, documents, causal) - lse_BKGS1).exp()  # [B, K, G, S, S]
        dout_, out_, q_ = (self._grouped(t, groups) for t in (dout, out, q))  # [B, K, G, S, E]
        dv = (weights.transpose(-1, -2) @ dout_).sum(2)
        dweights = dout_ @ self._shared(v).transpose(-1, -2)
        dscores = weights * (dweights - (dout_ * out_).sum(-1, keepdim=True)) * scale
        dq = dscores @ self._shared(k)
        dk = (dscores.transpose(-1, -2) @ q_).sum(2)
        return self._merged(dq, q), dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)

    def _scores(self, q: Tensor, k: Tensor, documents: Documents | None, causal: bool) -> Tensor:
        batch, sequence = q.shape[:2]
        q_BKGSE = self._grouped(q, q.shape[2] // k.shape[2])
        scores = q_BKGSE @ self._shared(k).transpose(-1, -2) / math.sqrt(q.shape[3])
        if not causal:
            return scores
        ones = torch.ones(batch, 1, 1, sequence, sequence, dtype=torch.bool, device=q.device)
        hidden = ones.triu(1)
        if documents is not None:
            places = torch.arange(batch * sequence, dtype=torch.int32)
            owner = torch.searchsorted(documents.boundaries, places, right=True)
            owner = owner.view(batch, 1, 1, sequence).to(q.device)
            hidden = hidden | (owner[..., :, None] != owner[..., None, :])
        return scores.masked_fill(hidden, -math.inf)

    @staticmethod
    def _grouped(t_BSHE: Tensor, groups: int) -> Tensor:
        """[B, S, H, E] -> [B, K, G, S, E]: query head h reads key-value head h // G."""
        t_BSKGE = t_BSHE.unflatten(2, (-1, groups))
        return t_BSKGE.permute(0, 2, 3, 1, 4).to(torch.promote_types(t_BSHE.dtype, torch.float32))

    @staticmethod
    def _shared(t_BSKE: Tensor) -> Tensor:
        """[B, S, K, E] -> [B, K, 1, S, E]."""
        t_BKSE = t_BSKE.transpose(1, 2).to(torch.promote_types(t_BSKE.dtype, torch.float32))
        return t_BKSE.unsqueeze(2)

    @staticmethod
    def _merged(t_BKGSE: Tensor, like: Tensor) -> Tensor:
        """[B, K, G, S, E] -> [B, S, H, E]."""
        return t_BKGSE.permute(0, 3, 1, 2, 4).reshape(like.shape).to(like.dtype)


@dataclass(frozen=True)
class KernelAttention:
    """A kernel as an attention: differentiable, and open to whoever can use the kernel itself."""

    kernel: AttentionKernel

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> Tensor:
        return attend(self.kernel, q, k, v, documents)


reference_attention: Attention = KernelAttention(ReferenceKernel())

KERNELS: dict[str, Callable[[], AttentionKernel]] = {
    "cpu": CpuKernel,
    "torch_flash": TorchFlashKernel,
    "cudnn": CudnnKernel,
    "reference": ReferenceKernel,
}


# --- other backends ------------------------------------------------------------------------------


def flash_attn_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
) -> Tensor:
    """The flash-attn package."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if documents is None:
        out: Tensor = flash_attn_func(q, k, v, causal=True)
        return out
    boundaries, longest = documents.boundaries_on(q.device), documents.longest
    out = flash_attn_varlen_func(
        *_flat(q, k, v), boundaries, boundaries, longest, longest, causal=True
    )
    return out.view(q.shape)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Whatever torch's ``scaled_dot_product_attention`` chooses; documents one after the other."""
    if documents is not None:
        parts = [sdpa_attention(*t) for _, t in _each_document(documents, q, k, v)]
        return torch.cat(parts, dim=1).view(q.shape)
    q_BHSE, k_BKSE, v_BKSE = _heads_first(q, k, v)
    out_BHSE = F.scaled_dot_product_attention(
        q_BHSE, k_BKSE, v_BKSE, is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out_BHSE.transpose(1, 2)


# --- layouts -------------------------------------------------------------------------------------


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[B, S, H, E] -> [B, H, S, E], as torch's attention has it."""
    return [t.transpose(1, 2) for t in tensors]


def _heads_second(tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = (t.transpose(1, 2) for t in tensors)
    return a, b, c


def _flat(*tensors: Tensor) -> list[Tensor]:
    """[B, S, H, E] -> [N, H, E], as variable-length kernels have it."""
    return [t.flatten(0, 1) for t in tensors]


def _rows_first(lse_HN: Tensor, q: Tensor) -> Tensor:
    """[H, N] -> [B, H, S], B and S as in q."""
    return lse_HN.unflatten(1, q.shape[:2]).transpose(0, 1)


def _flat_heads(lse_BHS: Tensor) -> Tensor:
    """[B, H, S] -> [H, N]."""
    return lse_BHS.transpose(0, 1).flatten(1)


def _each_document(documents: Documents, *tensors: Tensor) -> Any:
    """Each document's place in the flattened batch, and its part [1, length, H, E] of tensors."""
    # Tensors to write to are contiguous, so that this gives views of them.
    flat = [t.reshape(1, -1, *t.shape[2:]) for t in tensors]
    for start, end in pairwise(documents.offsets):
        part = slice(start, end)
        yield part, [t[:, part] for t in flat]
