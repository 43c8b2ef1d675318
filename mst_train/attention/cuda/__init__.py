"""Attention on CUDA devices: one module per implementation.

flash          what all but cuDNN's share: packed documents, windows, how packages refuse
torch_flash    the FlashAttention-2 that torch brings
cudnn          cuDNN's, through torch
flash_attn_2   the package flash-attn
flash_attn_3   FlashAttention-3, for Hopper
flash_attn_4   FlashAttention-4, for Hopper and Blackwell

All are called below autograd, where the forward gives the log-sum-exp and the backward takes one,
which torch's ``varlen_attn`` and the packages' own functions do not. Torch can be given
FlashAttention-3 and 4 in the place of its own (torch_flash uses them then); the modules here are
for capped scores, which torch's operator lacks, and so that all can be measured side by side. All
are checked for shapes, and for what they hand to the functions below them, without a device;
docs/measured.md says what has run on one.
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
