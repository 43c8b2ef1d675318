"""The mini-sequence method: exact training with bounded intermediates.

``mini_sequence_mlp`` and ``mini_sequence_cross_entropy`` are the method's two halves and the
package's public interface; ``recompute_block`` and ``Policy`` say how a decoder puts them to use.
"""

from mst_train.mst.block import recompute_block
from mst_train.mst.head import cross_entropy, mini_sequence_cross_entropy
from mst_train.mst.mlp import gated_mlp, mini_sequence_mlp
from mst_train.mst.policy import Policy

__all__ = [
    "Policy",
    "cross_entropy",
    "gated_mlp",
    "mini_sequence_cross_entropy",
    "mini_sequence_mlp",
    "recompute_block",
]
