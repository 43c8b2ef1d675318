"""Causal self-attention: one interface, several backends.

An attention takes queries, keys and values and returns what the queries read:

    q [B, S, H, E], k [B, S, K, E], v [B, S, K, E]  ->  [B, S, H, E]

with H a multiple of K: query heads share key-value heads in groups of H/K. Every query sees itself
and what lies before it, in its document where documents are given and in its row otherwise. What
scores are (scaled, capped, within a window) is ``mst.Scores``.

Backends that are kernels (``AttentionKernel``) give their log-sum-exp, so that a block can keep
their result; the others are computed again where a block is.

                            windows  capped  fp32, fp64
    cpu          CPU        yes      yes     yes         torch's flash attention for CPUs
    torch_flash  CUDA       yes      no      no          the FlashAttention-2 in torch
    cudnn        CUDA       no       no      no          cuDNN's; documents through torch_flash
    flash_attn   CUDA       yes      yes     no          the flash-attn package
    tiled        any        yes      yes     yes         torch's matrix products, tile by tile
    sdpa         any        no       no      yes         what torch chooses; not a kernel
    reference    any        yes      yes     yes         the formula; holds the whole score matrix

The CUDA backends have not been run on a GPU yet (see model/kernels_cuda.py).

Legend: B batch, S sequence, H query heads, K key-value heads, E head size.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_train.config import AUTO
from mst_train.errors import UserError
from mst_train.model.kernels_cpu import CpuKernel
from mst_train.model.kernels_cuda import CudnnKernel, FlashAttnKernel, TorchFlashKernel
from mst_train.model.kernels_reference import ReferenceKernel
from mst_train.model.kernels_tiled import TiledKernel
from mst_train.model.layouts import each_document, heads_first
from mst_train.mst.attention import PLAIN, AttentionKernel, Documents, Scores, attend

__all__ = [
    "KERNELS",
    "Attention",
    "CpuKernel",
    "CudnnKernel",
    "FlashAttnKernel",
    "KernelAttention",
    "ReferenceKernel",
    "SdpaAttention",
    "TiledKernel",
    "TorchFlashKernel",
    "reference_attention",
    "select_attention",
]

log = logging.getLogger(__name__)

WITHOUT_WINDOWS = ("cudnn", "sdpa")
WITHOUT_SOFTCAP = ("torch_flash", "cudnn", "sdpa")


class Attention(Protocol):
    """What the decoder calls; sequence-parallel attention has the same form."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> Tensor: ...

    def of(self, scores: Scores) -> "Attention":
        """The same for other scores. Raises UserError where it cannot compute them."""
        ...


def select_attention(
    name: str, device: torch.device, dtype: torch.dtype, scores: Scores = PLAIN
) -> Attention:
    """The backend of this name for tensors of this device and type.

    "auto" is cpu on a CPU. On CUDA it is cudnn from Hopper on and torch_flash before it and for
    windows; flash_attn for capped scores, or tiled without the package; in fp32 sdpa, and tiled for
    both. Raises UserError where the backend asked for cannot work here.
    """
    chosen = _automatic(device, dtype, scores) if name == AUTO else name
    problem = _problem(chosen, device, dtype, scores)
    if problem:
        raise UserError(f"kernel.attention={chosen} cannot be used: {problem}")
    choose = partial(select_attention, name, device, dtype)
    if chosen == "sdpa":
        return SdpaAttention(scores, choose)
    return KernelAttention(KERNELS[chosen](scores), choose)


def _automatic(device: torch.device, dtype: torch.dtype, scores: Scores) -> str:
    if device.type != "cuda":
        return "cpu"
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa" if scores.window is None and scores.softcap is None else "tiled"
    if scores.softcap is not None:
        if importlib.util.find_spec("flash_attn") is not None:
            return "flash_attn"
        _warn_of_tiled()
        return "tiled"
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    return "cudnn" if hopper and scores.window is None else "torch_flash"


@functools.cache
def _warn_of_tiled() -> None:
    """Once, and not for every layer."""
    log.warning(
        "attention with model.attention_softcap runs in tiles of plain matrix products, in fp32: "
        "the package flash-attn is much faster (pip install 'mst-train[gpu]')"
    )


def _problem(name: str, device: torch.device, dtype: torch.dtype, scores: Scores) -> str | None:
    if name == "cpu" and device.type != "cpu":
        return f"it runs on the CPU, and this run's device is {device.type}"
    if scores.window is not None and name in WITHOUT_WINDOWS:
        return (
            f"it has no sliding window, and model.sliding_window={scores.window}: set "
            f"kernel.attention={AUTO}"
        )
    if scores.softcap is not None and name in WITHOUT_SOFTCAP:
        return (
            f"it does not cap scores, and model.attention_softcap={scores.softcap}: set "
            f"kernel.attention={AUTO}"
        )
    if name not in ("torch_flash", "cudnn", "flash_attn"):
        return None
    if device.type != "cuda":
        return f"it runs on CUDA devices, and this run's device is {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "it computes in bf16: set precision=bf16 or precision=bf16_master"
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed: pip install 'mst-train[gpu]'"
    return None


@dataclass(frozen=True)
class KernelAttention:
    """A kernel as an attention: differentiable, and open to whoever can use the kernel itself.

    choose: gives the attention for other scores; without it there is this kernel alone.
    """

    kernel: AttentionKernel
    choose: Callable[[Scores], Attention] | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> Tensor:
        return attend(self.kernel, q, k, v, documents)

    def of(self, scores: Scores) -> Attention:
        if scores == self.kernel.scores:
            return self
        if self.choose is None:
            raise ValueError(f"this attention computes {self.kernel.scores}, not {scores}")
        return self.choose(scores)


@dataclass(frozen=True)
class SdpaAttention:
    """Whatever torch's ``scaled_dot_product_attention`` chooses; documents one after the other."""

    scores: Scores
    of: Callable[[Scores], Attention]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None
    ) -> Tensor:
        if documents is not None:
            parts = [self(*tensors) for _, tensors in each_document(documents, q, k, v)]
            return torch.cat(parts, dim=1).view(q.shape)
        q_BHSE, k_BKSE, v_BKSE = heads_first(q, k, v)
        out_BHSE = F.scaled_dot_product_attention(
            q_BHSE,
            k_BKSE,
            v_BKSE,
            is_causal=True,
            scale=self.scores.scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out_BHSE.transpose(1, 2)


KERNELS: dict[str, Callable[[Scores], AttentionKernel]] = {
    "cpu": CpuKernel,
    "torch_flash": TorchFlashKernel,
    "cudnn": CudnnKernel,
    "flash_attn": FlashAttnKernel,
    "tiled": TiledKernel,
    "reference": ReferenceKernel,
}

reference_attention: Attention = select_attention("reference", torch.device("cpu"), torch.float32)
