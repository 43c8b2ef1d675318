"""Causal self-attention: one interface, several backends.

An attention takes queries, keys and values and returns what the queries read:

    q [B, S, H, E], k [B, S, K, E], v [B, S, K, E]  ->  [B, S, H, E]

with H a multiple of K: query heads share key-value heads in groups of H/K. Every query sees itself
and what lies before it, scaled by 1/sqrt(E).

Legend: B batch, S sequence, H query heads, K key-value heads, E head size.
"""

import importlib.util
import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_train.errors import UserError


class Attention(Protocol):
    """What the decoder calls; sequence-parallel attention has the same form."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def select_attention(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """The backend of this name for tensors of this device and type.

    "auto" takes flash-attn where it is installed and can work, else torch's fused kernels. Raises
    UserError where the backend asked for cannot work here.
    """
    flash_problem = _flash_problem(device, dtype)
    if name == "auto":
        name = "sdpa" if flash_problem else "flash"
    if name == "flash":
        if flash_problem:
            raise UserError(f"kernel.attention=flash cannot be used: {flash_problem}")
        return flash_attention
    return {"sdpa": sdpa_attention, "reference": reference_attention}[name]


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The flash-attn package's kernel: fp16 and bf16 on CUDA, no score matrix in memory."""
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(q, k, v, causal=True)
    return out


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's fused kernels, on CPU and CUDA; no score matrix in memory where one of them fits."""
    out_BHSE = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out_BHSE.transpose(1, 2)


def reference_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula, in q's own type (fp32 scores at least): what the other backends are held to.

    Holds the whole score matrix, [B, H, S, S].
    """
    batch, sequence, heads, size = q.shape
    groups = heads // k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    # Query head h reads key-value head h // groups.
    q_BKGSE = q.to(dtype).view(batch, sequence, -1, groups, size).permute(0, 2, 3, 1, 4)
    k_BK1SE = k.to(dtype).permute(0, 2, 1, 3).unsqueeze(2)
    v_BK1SE = v.to(dtype).permute(0, 2, 1, 3).unsqueeze(2)
    scores_BKGSS = q_BKGSE @ k_BK1SE.transpose(-1, -2) / math.sqrt(size)
    future = torch.ones(sequence, sequence, dtype=torch.bool, device=q.device).triu(1)
    weights_BKGSS = scores_BKGSS.masked_fill(future, -math.inf).softmax(-1)
    out_BSKGE = (weights_BKGSS @ v_BK1SE).permute(0, 3, 1, 2, 4)
    return out_BSKGE.reshape(q.shape).to(q.dtype)


def _flash_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"flash-attn runs on CUDA devices, and this run's device is {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "flash-attn computes in bf16: set precision=bf16 or precision=bf16_master"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed: pip install 'mst-train[gpu]'"
    return None
