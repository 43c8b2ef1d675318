"""What an operation can learn of the block that it runs in.

A block that is run again in the backward wants less of its operations than it did in the forward:
attention's result may have been kept, and the result of the last MLP may be read by nobody.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class BlockRun:
    """One run of a block, forward or again. As it is here, it asks for everything."""

    def keep(self, *tensors: Tensor) -> None:
        """In the forward: keep these for the re-run, if attention is to be kept."""

    def take(self, count: int) -> list[Tensor]:
        """In the re-run: the next ``count`` tensors that the forward kept, if it did."""
        return []

    def result_unread(self, saved: int) -> bool:
        """Whether nobody reads the result of an operation that saves ``saved`` tensors.

        It may then return ``unread`` in its place.
        """
        return False


_current: ContextVar[BlockRun | None] = ContextVar("block_run", default=None)


def current_run() -> BlockRun | None:
    """The run that the caller is part of, if any."""
    return _current.get()


@contextmanager
def running(run: BlockRun) -> Iterator[None]:
    """Operations in this context are part of ``run``."""
    token = _current.set(run)
    try:
        yield
    finally:
        _current.reset(token)


def unread(like: Tensor) -> Tensor:
    """A tensor of this shape without memory; whoever reads it reads NaN."""
    return like.new_full((), torch.nan).expand_as(like)


def is_unread(tensor: Tensor) -> bool:
    """Whether a tensor is what ``unread`` gave, or a view of it."""
    return tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
