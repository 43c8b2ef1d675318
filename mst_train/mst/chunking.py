"""How a sequence is cut into mini-sequences.

A chunk has to be long enough that its matrix products run at full speed and short enough that its
intermediates stay small. Both ends are properties of the model and the device, so the number of
tokens in a chunk is bounded by bytes and does not grow with the sequence.
"""

from collections.abc import Iterator
from typing import SupportsIndex

import torch

MULTIPLE = 256
"""Chunks are whole matrix-product tiles."""

MINIMUM = 1024
"""Below this many tokens a GPU's matrix products slow down."""

INTERMEDIATE_BYTES = {"cpu": 32 * 2**20, "cuda": 768 * 2**20}
"""What one chunk's intermediates may take, by device type."""

BLOCK_BYTES = {"cpu": 64 * 2**20, "cuda": 1280 * 2**20}
"""The same for a chunk of a whole block: the results of all its products, and their gradients."""


def chunk_slices(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Consecutive slices that cover ``range(tokens)``, the last one possibly shorter."""
    for start in range(0, tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, tokens))


def auto_chunk_tokens(
    tokens: int,
    bytes_per_token: int,
    device: torch.device,
    bounds: dict[str, int] = INTERMEDIATE_BYTES,
) -> int:
    """Tokens per chunk so that a chunk's intermediates stay within the device's bound.

    ``tokens`` have intermediates of ``bytes_per_token`` each. All of them make one chunk
    where they fit the bound. Otherwise the chunks are as even as multiples of 256 allow, and never
    below 1024 tokens.
    """
    bound = bounds.get(device.type, bounds["cuda"])
    largest = max(bound // max(bytes_per_token, 1) // MULTIPLE * MULTIPLE, MINIMUM)
    if tokens <= largest:
        return max(tokens, 1)
    chunks = -(-tokens // largest)
    return -(-tokens // (chunks * MULTIPLE)) * MULTIPLE


def resolve_chunk_tokens(
    chunk_tokens: int | str,
    tokens: int,
    bytes_per_token: int,
    device: torch.device,
    bounds: dict[str, int] = INTERMEDIATE_BYTES,
) -> int:
    """``chunk_tokens`` as a number: itself (at most ``tokens``), or the choice for "auto".

    Raises ValueError for anything else.
    """
    if chunk_tokens == "auto":
        return auto_chunk_tokens(tokens, bytes_per_token, device, bounds)
    integral = isinstance(chunk_tokens, SupportsIndex) and not isinstance(chunk_tokens, bool)
    if not integral or int(chunk_tokens) < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens!r} must be a positive integer or 'auto'")
    return max(min(int(chunk_tokens), tokens), 1)
