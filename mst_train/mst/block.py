"""Activation recomputation of one decoder block."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recompute_block(block: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Tensor:
    """``block(x, *arguments)``, keeping x alone for the backward.

    The backward runs the block again to rebuild what autograd needs (Chen et al. 2016, "Training
    deep nets with sublinear memory cost"). The block must give the same result twice: it may not
    draw random numbers.

    Memory: x. Recomputation: the block's forward.
    """
    if not torch.is_grad_enabled():
        return block(x, *arguments)
    result: Tensor = checkpoint(block, x, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result
