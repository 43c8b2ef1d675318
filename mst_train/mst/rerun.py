"""What makes a block's second run like its first, or tells that it would not be."""

from torch import Tensor


def owner(tensor: Tensor) -> Tensor:
    """The tensor that ``tensor`` is a view of, or itself: they share memory and version."""
    return tensor if tensor._base is None else tensor._base
