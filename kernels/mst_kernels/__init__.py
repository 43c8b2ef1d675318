"""Memory-bound operations of a decoder, each as a Triton kernel with a torch twin.

    glu             gated activation of the feed-forward layer, forward and backward in place
    cross_entropy   loss of each row of logits, its gradient written over the logits
    rms_norm        RMSNorm, alone or fused with the residual addition before it
    rope            rotary position embedding, in place
    backend         which of the two implementations runs; row_blocks: blocks for torch's

Each of the first four has the formulas and the torch implementation (for CPUs, and for float64);
norms and rotary embeddings the autograd Function too. Its `_triton` neighbour has the kernels, and
is imported when the first one runs: the package imports without triton, and depends on torch only.

The Triton kernels compile for CUDA (sm_80 and sm_90); docs/measured.md says where they have run.
"""

from mst_kernels.backend import backend, get_backend, set_backend, use_triton
from mst_kernels.cross_entropy import cross_entropy_
from mst_kernels.glu import glu_backward_, glu_forward
from mst_kernels.rms_norm import add_rms_norm, rms_norm
from mst_kernels.rope import apply_rope_, rope

__all__ = [
    "add_rms_norm",
    "apply_rope_",
    "backend",
    "cross_entropy_",
    "get_backend",
    "glu_backward_",
    "glu_forward",
    "rms_norm",
    "rope",
    "set_backend",
    "use_triton",
]
