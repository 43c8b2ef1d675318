"""The mini-sequence method: exact training with bounded intermediates.

``mini_sequence_mlp`` and ``mini_sequence_cross_entropy`` are the method's two halves;
``recompute_block`` is one call around a decoder block, and ``attend`` lets it keep what attention
computed; ``Offload`` keeps it on the host. ``Policy`` says how a decoder puts them to use.
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
