"""Blocks of rows, in which the torch implementations work.

A block bounds the temporaries of an operation and, on a CPU, keeps them in the cache: most of these
operations are several passes over the same data.
"""

from collections.abc import Iterator

import torch

from mst_kernels.backend import is_fake

_CPU_BLOCK_ELEMENTS = 1 << 19  # two of them in fp32 fit a core's cache
_GPU_BLOCK_ELEMENTS = 1 << 24  # large enough that the launches do not dominate


def row_blocks(tensor: torch.Tensor, rows: int, elements_per_row: int) -> Iterator[slice]:
    """Slices that cover ``range(rows)``, each of a block's elements at most, but a row at least.

    A tensor without data yields its first two blocks only, as what is made for one is still there
    while the next is worked on. None is larger, so a simulated run allocates what a real one does
    at its peak, in a time that does not grow with the tensor.
    """
    limit = _GPU_BLOCK_ELEMENTS if tensor.is_cuda else _CPU_BLOCK_ELEMENTS
    step = max(1, limit // max(1, elements_per_row))
    last = min(rows, 2 * step) if is_fake(tensor) else rows
    for start in range(0, last, step):
        yield slice(start, min(start + step, rows))
