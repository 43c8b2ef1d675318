"""Attention on CUDA devices: one module per implementation.

torch_flash    the FlashAttention-2 that torch brings
cudnn          cuDNN's, through torch
flash_attn_2   the package flash-attn
flash_attn_3   FlashAttention-3, for Hopper
flash_attn_4   FlashAttention-4, for Hopper and Blackwell
packages       what the packages' modules share

The packages' kernels are called below their autograd functions, where the forward gives the
log-sum-exp and the backward takes one. All are checked for shapes, and for what they hand to the
functions below them, without a device; docs/measured.md says what has run on one.
"""

from mst_train.attention.cuda.cudnn import CudnnKernel
from mst_train.attention.cuda.flash_attn_2 import FlashAttnKernel
from mst_train.attention.cuda.flash_attn_3 import FlashAttn3Kernel
from mst_train.attention.cuda.flash_attn_4 import FlashAttn4Kernel
from mst_train.attention.cuda.torch_flash import TorchFlashKernel

__all__ = [
    "CudnnKernel",
    "FlashAttn3Kernel",
    "FlashAttn4Kernel",
    "FlashAttnKernel",
    "TorchFlashKernel",
]
