"""Chunk sizes: bounded in bytes, whole tiles, one chunk where everything fits."""

import pytest
import torch

from mst_train.mst.chunking import (
    INTERMEDIATE_BYTES,
    auto_chunk_tokens,
    chunk_slices,
    resolve_chunk_tokens,
)

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
LLAMA3_MLP = 4 * 14336 * 2
LLAMA3_LOGITS = 128256 * (2 + 4)


@pytest.mark.parametrize(("tokens", "chunk"), [(0, 4), (1, 4), (8, 4), (9, 4), (3, 4)])
def test_slices_cover_every_token_once(tokens, chunk):
    covered = [i for s in chunk_slices(tokens, chunk) for i in range(tokens)[s]]
    assert covered == list(range(tokens))


@pytest.mark.parametrize("bytes_per_token", [LLAMA3_MLP, LLAMA3_LOGITS, 64])
@pytest.mark.parametrize("device", [CUDA, CPU])
@pytest.mark.parametrize("tokens", [1, 256, 1000, 1024, 5000, 61440, 1_000_000])
def test_automatic_chunks(tokens, device, bytes_per_token):
    chunk = auto_chunk_tokens(tokens, bytes_per_token, device)
    bound = INTERMEDIATE_BYTES[device.type]
    assert chunk == tokens or chunk % 256 == 0
    assert chunk >= min(tokens, 1024) or -(-tokens // chunk) * 1024 > tokens
    assert chunk * bytes_per_token <= max(bound, 1024 * bytes_per_token)
    if tokens * bytes_per_token <= bound:
        assert chunk == tokens


def test_chunks_do_not_grow_with_the_sequence():
    sizes = {auto_chunk_tokens(n * 2**20, LLAMA3_MLP, CUDA) for n in (1, 4, 16)}
    assert len(sizes) == 1


def test_a_given_size_is_taken():
    assert resolve_chunk_tokens(300, 1000, 8, CPU) == 300
    assert resolve_chunk_tokens(300, 100, 8, CPU) == 100
    for wrong in (0, -1, "most", 2.0, True):
        with pytest.raises(ValueError, match="positive integer or 'auto'"):
            resolve_chunk_tokens(wrong, 100, 8, CPU)  # type: ignore[arg-type]
