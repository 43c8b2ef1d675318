"""Rotary position embeddings (Su et al. 2021).

Features e and e + E/2 of a head are the two coordinates of a point that is turned by the angle
position * theta^(-2e/E): the "half rotation" layout that Hugging Face checkpoints have.

Legend: B batch, S sequence, E head size.
"""

import torch
from torch import Tensor

from mst_kernels import rope

__all__ = ["rope", "rotary_angles"]


def rotary_angles(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles at every position, [S] or [B, S] -> [..., S, E/2].

    Computed in fp32, like the implementations that checkpoints were trained with, and given in
    fp32, or fp64 for activations of that ``dtype``.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (exponents / head_dim)
    angles = positions[..., None].float() * frequencies
    table_dtype = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(table_dtype), angles.sin().to(table_dtype)
