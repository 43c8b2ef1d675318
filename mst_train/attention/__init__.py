"""Attention: one interface over every implementation of it.

select      the implementation that ``kernel.attention`` names, or the fastest that is right
measure     which that is, on this device
reference   the definition
cpu, tiled  for CPUs, and anywhere in tiles
cuda        for CUDA devices
layouts     the shapes in which kernels want queries, keys and values; mask: who sees whom
"""

from mst_train.attention.measure import choices, keep_to
from mst_train.attention.select import (
    Attention,
    attention_kernel,
    select_attention,
    select_kernels,
)

__all__ = [
    "Attention",
    "attention_kernel",
    "choices",
    "keep_to",
    "select_attention",
    "select_kernels",
]
