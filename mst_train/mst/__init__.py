"""The mini-sequence method: exact training with bounded intermediates.

``mini_sequence_mlp`` and ``mini_sequence_cross_entropy`` are the method's two halves;
``mini_sequence_block`` and ``recompute_block`` are one call around a decoder block, ``attend`` lets
the latter keep what attention computed, and ``Offload`` keeps it on the host.

mlp, head                 the two halves
block, attention_chunk    the whole block in mini-sequences; attention of one chunk of queries
parameters                what stands for a block's parameters while it is run again
recompute, rerun          a block in one piece, run again; what makes the second run like the first
attention                 what an attention kernel is
offload, host_memory      kept tensors in host memory; page-locked tensors
chunking, accumulate      sizes of chunks; weights' gradients, summed over them
autograd, autocast        what the autograd functions share
"""

from mst_train.mst.attention import AttentionKernel, Documents, Scores, attend
from mst_train.mst.block import RowwiseBlock, mini_sequence_block
from mst_train.mst.head import (
    cross_entropy,
    mini_sequence_cross_entropy,
    mini_sequence_losses,
)
from mst_train.mst.mlp import gated_mlp, mini_sequence_mlp
from mst_train.mst.offload import HostBudgetError, Offload
from mst_train.mst.recompute import recompute_block

__all__ = [
    "AttentionKernel",
    "Documents",
    "HostBudgetError",
    "Offload",
    "RowwiseBlock",
    "Scores",
    "attend",
    "cross_entropy",
    "gated_mlp",
    "mini_sequence_block",
    "mini_sequence_cross_entropy",
    "mini_sequence_losses",
    "mini_sequence_mlp",
    "recompute_block",
]
