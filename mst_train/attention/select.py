"""Causal self-attention: one interface, several backends.

An attention takes queries, keys and values and returns what the queries read:

    q [B, S, H, E], k [B, S, K, E], v [B, S, K, E]  ->  [B, S, H, E]

with H a multiple of K: query heads share key-value heads in groups of H/K. Every query sees itself
and what lies before it, in its document where documents are given and in its row otherwise. What
scores are (scaled, capped, within a window) is ``mst.Scores``. Each head may have a sink, which
joins the result of any kernel (``mst/sinks.py``); sdpa has none.

Backends that are kernels (``AttentionKernel``) give their log-sum-exp, so that a block can keep
their result; the others are computed again where a block is.

                            windows  capped  fp32, fp64
    cpu          CPU        yes      yes     yes         torch's flash attention for CPUs
    torch_flash  CUDA       yes      no      no          the FlashAttention-2 in torch
    cudnn        CUDA       no       no      no          cuDNN's; documents through torch_flash
    flash_attn   CUDA       yes      yes     no          the flash-attn package: FlashAttention-2
    flash_attn_3 Hopper     yes      yes     no          the flash-attn-3 package
    flash_attn_4 Hopper on  yes      yes     no          the flash-attn-4 package
    tiled        any        yes      yes     yes         torch's matrix products, tile by tile
    sdpa         any        no       no      yes         what torch chooses; not a kernel
    reference    any        yes      yes     yes         the formula; holds the whole score matrix

On a CUDA device ``kernel.attention=auto`` measures which of them is the fastest
(attention/measure.py); docs/measured.md says which of them have run on one.

Legend: B batch, S sequence, H query heads, K key-value heads, E head size.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_kernels import set_backend, use_triton
from mst_train.attention.cpu import CpuKernel
from mst_train.attention.cuda import (
    CudnnKernel,
    FlashAttn3Kernel,
    FlashAttn4Kernel,
    FlashAttnKernel,
    TorchFlashKernel,
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
)
from mst_train.attention.layouts import heads_first
from mst_train.attention.measure import MeasuredKernel
from mst_train.attention.reference import ReferenceKernel
from mst_train.attention.tiled import TiledKernel
from mst_train.config import AUTO, KernelConfig
from mst_train.errors import UserError
from mst_train.mst.attention import PLAIN, AttentionKernel, Documents, Scores, attend
from mst_train.mst.sharing import SharedSequence, attend_shared

__all__ = [
    "KERNELS",
    "Attention",
    "CpuKernel",
    "CudnnKernel",
    "FlashAttn3Kernel",
    "FlashAttn4Kernel",
    "FlashAttnKernel",
    "KernelAttention",
    "ReferenceKernel",
    "SdpaAttention",
    "TiledKernel",
    "TorchFlashKernel",
    "reference_attention",
    "select_attention",
    "select_kernels",
    "shared",
]

log = logging.getLogger(__name__)

WITHOUT_WINDOWS = ("cudnn", "sdpa")
WITHOUT_SOFTCAP = ("torch_flash", "cudnn", "sdpa")
WITHOUT_SINKS = ("sdpa",)
"""They do not give the log-sum-exp with which sinks join."""

NOT_DETERMINISTIC = ("cudnn",)
"""Torch says so of its own; of the rest each has a slower backward that is, and takes it."""

PLANNING = ("cudnn",)
"""They plan for each exact length, once, in some tens of milliseconds."""

HALF = (torch.float16, torch.bfloat16)
FOR_CUDA = ("flash_attn_4", "flash_attn_3", "cudnn", "flash_attn", "torch_flash")
PACKAGES = {
    "flash_attn": flash_attn_2.problem,
    "flash_attn_3": flash_attn_3.problem,
    "flash_attn_4": flash_attn_4.problem,
}
"""Why a package's kernel cannot be used on a device for some scores."""


class Attention(Protocol):
    """What the decoder calls; sequence-parallel attention has the same form."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor: ...

    def of(self, scores: Scores) -> "Attention":
        """The same for other scores. Raises UserError where it cannot compute them."""
        ...


def select_attention(
    name: str, device: torch.device, dtype: torch.dtype, scores: Scores = PLAIN
) -> Attention:
    """The backend of this name for tensors of this device and type.

    "auto" is cpu on a CPU. On CUDA it is for each kind of call the fastest of FOR_CUDA that work,
    and tiled where none has these scores; in fp32 it is sdpa, and tiled where scores are capped, in
    windows or beside sinks. Under torch's deterministic algorithms only what is deterministic is
    taken. Raises UserError where the backend asked for cannot work here.
    """
    choose = partial(select_attention, name, device, dtype)
    if name == AUTO and device.type == "cuda" and dtype in HALF:
        return KernelAttention(_measured(device, dtype, scores), choose)
    chosen = _automatic(device, scores) if name == AUTO else name
    problem = _problem(chosen, device, dtype, scores)
    if problem:
        raise UserError(f"kernel.attention={chosen} cannot be used: {problem}")
    if chosen == "sdpa":
        return SdpaAttention(scores, choose)
    if chosen == "tiled":
        return KernelAttention(TiledKernel(scores, device.type), choose)
    return KernelAttention(KERNELS[chosen](scores), choose)


def attention_kernel(
    device: torch.device, dtype: torch.dtype, scores: Scores = PLAIN
) -> AttentionKernel:
    """What ``mini_sequence_block`` and ``attend`` compute attention with on this device.

    The fastest that is right, as ``select_attention`` finds it; tiled where that is no such kernel
    (fp32 on CUDA).
    """
    chosen = select_attention(AUTO, device, dtype, scores)
    if isinstance(chosen, KernelAttention):
        return chosen.kernel
    return TiledKernel(scores, device.type)


def shared(
    attention: Attention, sharing: SharedSequence, device: torch.device
) -> "KernelAttention":
    """The same attention over sequences that several processes share.

    Tiled where it is no kernel: nobody but a kernel can attend to a part of the keys.
    """

    def of(scores: Scores) -> "KernelAttention":
        return shared(attention.of(scores), sharing, device)

    if isinstance(attention, KernelAttention):
        return KernelAttention(attention.kernel, of, sharing)
    assert isinstance(attention, SdpaAttention)
    return KernelAttention(TiledKernel(attention.scores, device.type), of, sharing)


def select_kernels(config: KernelConfig, device: torch.device, dtype: torch.dtype) -> Attention:
    """Attention as ``kernel.attention`` asks for it, with the other kernels on ``kernel.backend``.

    Raises UserError where either cannot be used here.
    """
    try:
        set_backend(config.backend)
        use_triton(torch.empty(0, device=device, dtype=dtype))
    except ValueError as error:
        raise UserError(f"kernel.backend={config.backend} cannot be used: {error}") from error
    return select_attention(config.attention, device, dtype)


def _automatic(device: torch.device, scores: Scores) -> str:
    """Without measuring."""
    if device.type != "cuda":
        return "cpu"
    return "tiled" if scores.window or scores.softcap or scores.sinks else "sdpa"


def _measured(device: torch.device, dtype: torch.dtype, scores: Scores) -> AttentionKernel:
    """The fastest kernel of those that do not refuse."""
    names = [name for name in FOR_CUDA if _problem(name, device, dtype, scores) is None]
    if not names:
        _warn_of_tiled()
        return TiledKernel(scores, device.type)
    kernels = {name: KERNELS[name](scores) for name in names}
    return MeasuredKernel(kernels, scores, for_few_lengths=PLANNING)


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
    if scores.sinks and name in WITHOUT_SINKS:
        return (
            f"it gives no log-sum-exp for sinks to join, and model.attention_sinks=true: set "
            f"kernel.attention={AUTO}"
        )
    deterministic = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda" and deterministic and name in NOT_DETERMINISTIC:
        return (
            f"its backward adds in another order each time, and train.deterministic=true: set "
            f"kernel.attention={AUTO}"
        )
    if name not in FOR_CUDA:
        return None
    if device.type != "cuda":
        return f"it runs on CUDA devices, and this run's device is {device.type}"
    if dtype not in HALF:
        return "it computes in bf16: set precision=bf16 or precision=bf16_master"
    return PACKAGES[name](device, scores) if name in PACKAGES else None


@dataclass(frozen=True)
class KernelAttention:
    """A kernel as an attention: differentiable, and open to whoever can use the kernel itself.

    choose: gives the attention for other scores; without it there is this kernel alone. sharing:
    the processes that share the sequences; None: this one has them to itself.
    """

    kernel: AttentionKernel
    choose: Callable[[Scores], Attention] | None = None
    sharing: SharedSequence | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        if self.sharing is not None:
            return attend_shared(self.kernel, self.sharing, q, k, v, documents, sinks)
        return attend(self.kernel, q, k, v, documents, sinks)

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
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        assert sinks is None
        if documents is not None:
            # One split of each, whose backward puts all gradients together at once.
            lengths = [end - start for start, end in pairwise(documents.offsets)]
            rows = [t.reshape(1, -1, *t.shape[2:]).split(lengths, dim=1) for t in (q, k, v)]
            parts = [self.whole(*tensors) for tensors in zip(*rows, strict=True)]
            return torch.cat(parts, dim=1).view(q.shape)
        return self.whole(q, k, v)

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Without documents."""
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
    "flash_attn_3": FlashAttn3Kernel,
    "flash_attn_4": FlashAttn4Kernel,
    "tiled": TiledKernel,
    "reference": ReferenceKernel,
}

reference_attention: Attention = select_attention("reference", torch.device("cpu"), torch.float32)
