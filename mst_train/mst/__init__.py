"""The mini-sequence method: exact training with bounded intermediates.

``mini_sequence_mlp`` and ``mini_sequence_cross_entropy`` are the method's two halves;
``mini_sequence_block`` and ``recompute_block`` are one call around a decoder block, ``attend`` lets
the latter keep what attention computed, and ``Offload`` keeps it on the host.

mlp, head                 the two halves
two_nodes                 how they are nodes of autograd's graph
experts                   mixtures of experts, the standard way
mini_sequence_experts     and in mini-sequences
grouped, router_losses    their products; what keeps them evenly used
block                     the whole block in mini-sequences
block_fused, block_shared its schedules: the whole sequence here, and one that processes share
block_parts, parameters   what both are made of; what stands for parameters in the second run
attention_chunk           attention of one chunk of queries
sharing                   a sequence that several processes share, and attention over it
kept                      what a block keeps beside its input
recompute, rerun          a block in one piece, run again; what makes the second run like the first
attention, sinks          what an attention kernel is; a logit beside the keys' scores
offload, host_memory      kept tensors in host memory; page-locked tensors
on_host, rowwise          hidden states and gradients there, between blocks; read by a norm
chunking, accumulate      sizes of chunks; weights' gradients, summed over them
autograd, autocast        what the autograd functions share
"""

from mst_train.mst.attention import AttentionKernel, Documents, Scores, attend
from mst_train.mst.block import mini_sequence_block
from mst_train.mst.block_parts import RowwiseBlock
from mst_train.mst.experts import gated_experts, route
from mst_train.mst.head import (
    cross_entropy,
    mini_sequence_cross_entropy,
    mini_sequence_losses,
)
from mst_train.mst.kept import ATTENTION, KEYS, MLP, OUTPUT, PIECES, QUERIES, linear
from mst_train.mst.mini_sequence_experts import mini_sequence_experts
from mst_train.mst.mlp import gated_mlp, mini_sequence_mlp
from mst_train.mst.offload import HostBudgetError, Offload
from mst_train.mst.on_host import OnHost
from mst_train.mst.recompute import recompute_block
from mst_train.mst.rowwise import rowwise

__all__ = [
    "ATTENTION",
    "KEYS",
    "MLP",
    "OUTPUT",
    "PIECES",
    "QUERIES",
    "AttentionKernel",
    "Documents",
    "HostBudgetError",
    "Offload",
    "OnHost",
    "RowwiseBlock",
    "Scores",
    "attend",
    "cross_entropy",
    "gated_experts",
    "gated_mlp",
    "linear",
    "mini_sequence_block",
    "mini_sequence_cross_entropy",
    "mini_sequence_experts",
    "mini_sequence_losses",
    "mini_sequence_mlp",
    "recompute_block",
    "route",
    "rowwise",
]
