"""FlashAttention-4: the package flash-attn-4, module ``flash_attn.cute``.

Its kernels are written in the CuTe DSL and compiled when they are first called, which takes many
seconds. Arguments, conventions and limits were read in the package's 4.0.0b36, flash_attn/cute/
interface.py; earlier betas lack some of them silently (up to 4.0.0b8 the backward leaves caps out),
so they are refused. The package flash-attn carries a ``flash_attn.cute`` of its own, older still,
and whichever of the two is installed last owns the folder.

Legend: B batch, S sequence, N = B*S, H query heads, K key-value heads, E head size.
"""

import importlib.metadata
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from mst_train.attention.cuda.flash import (
    FlashKernel,
    Packed,
    import_problem,
    refused_head_size,
)
from mst_train.mst.attention import Scores

OLDEST = "4.0.0b36"
REMEDY = f"pip install 'flash-attn-4>={OLDEST}'"


def problem(device: torch.device, scores: Scores) -> str | None:
    """Why FlashAttn4Kernel cannot be used here; None: it can."""
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return f"the package flash-attn-4 is not installed: {REMEDY}"
    if TorchVersion(version) < OLDEST:
        return f"flash-attn-4 {version} is too old: {REMEDY}"
    broken = import_problem(
        "flash_attn.cute.interface", "flash-attn-4", f"{REMEDY} --force-reinstall --no-deps"
    )
    if broken:
        return broken
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (9, 10, 11, 12):
        return (
            f"it is for Hopper and Blackwell (compute capability 9 to 12), and this device has "
            f"{major}.{minor}"
        )
    if major == 12 and scores.softcap is not None:
        return f"its backward has no capped scores on compute capability {major}.{minor}"
    return None


class FlashAttn4Kernel(FlashKernel):
    """FlashAttention-4: windows and capped scores; heads in multiples of 8.

    Heads are of up to 256 on Hopper, up to 128 or 256 on compute capability 10 and 11, and up to
    192 on 12. Memory of the backward besides the gradients: the queries' in fp32, and the keys' and
    values' where heads share them.
    """

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, packed: Packed, causal: bool
    ) -> tuple[Tensor, Tensor]:
        from flash_attn.cute.interface import _flash_attn_fwd

        _check_head_size(q)
        options = self._options(q, packed, causal)
        out, lse, *_ = _flash_attn_fwd(q, k, v, **options, return_lse=True)
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
        from flash_attn.cute.interface import _flash_attn_bwd

        deterministic = torch.are_deterministic_algorithms_enabled()
        options = self._options(q, packed, causal) | {"deterministic": deterministic}
        gradients: tuple[Tensor, ...] = _flash_attn_bwd(q, k, v, out, dout, lse, **options)
        return gradients

    def _options(self, q: Tensor, packed: Packed, causal: bool) -> dict[str, Any]:
        left, right = self.window(None)
        return {
            "cu_seqlens_q": packed.cu_seqlens,
            "cu_seqlens_k": packed.cu_seqlens,
            "max_seqlen_q": packed.longest,
            "max_seqlen_k": packed.longest,
            "softmax_scale": self.scores.scale or q.shape[-1] ** -0.5,
            "causal": causal,
            "window_size_left": left,
            "window_size_right": right,
            "softcap": self.scores.softcap or 0.0,
        }


def _check_head_size(q: Tensor) -> None:
    size, (major, _) = q.shape[-1], torch.cuda.get_device_capability(q.device)
    largest = {9: 256, 12: 192}.get(major, 128)
    if size % 8 or not (size <= largest or (size == 256 and major in (10, 11))):
        accepted = f"up to {largest}{' or of 256' if major in (10, 11) else ''}, in multiples of 8"
        raise refused_head_size("flash_attn_4", size, accepted)
