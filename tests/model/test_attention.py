"""Attention backends against the formula, and what they hold in memory."""

import math

import pytest
import torch

from mst_train.errors import UserError
from mst_train.memory.tracker import MemoryTracker
from mst_train.model.attention import reference_attention, sdpa_attention, select_attention

CPU = torch.device("cpu")


def make_inputs(heads, kv_heads, sequence=13, size=6, batch=2, dtype=torch.float64):
    torch.manual_seed(0)
    q = torch.randn(batch, sequence, heads, size, dtype=dtype)
    k, v = torch.randn(2, batch, sequence, kv_heads, size, dtype=dtype)
    return [t.clone().requires_grad_() for t in (q, k, v)]


def textbook(q, k, v):
    """Row by row and head by head."""
    out = torch.empty_like(q)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for s in range(q.shape[1]):
                keys, values = k[b, : s + 1, h // group], v[b, : s + 1, h // group]
                weights = (keys @ q[b, s, h] / math.sqrt(q.shape[3])).softmax(0)
                out[b, s, h] = weights @ values
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (1, 1)])
def test_reference_is_the_formula(heads, kv_heads):
    q, k, v = (t.detach() for t in make_inputs(heads, kv_heads))
    torch.testing.assert_close(
        reference_attention(q, k, v), textbook(q, k, v), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("sequence", [1, 13, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_sdpa_equals_the_reference(heads, kv_heads, sequence):
    inputs = make_inputs(heads, kv_heads, sequence)
    dout = torch.randn_like(inputs[0])
    expected = reference_attention(*inputs)
    actual = sdpa_attention(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, dout),
        torch.autograd.grad(expected, inputs, dout),
        rtol=1e-11,
        atol=1e-11,
    )


def test_sdpa_holds_no_score_matrix():
    sequence, heads, size = 512, 4, 16
    inputs = make_inputs(heads, 2, sequence, size, batch=1, dtype=torch.float32)
    with MemoryTracker() as tracker:
        sdpa_attention(*inputs).sum().backward()
    one_head_of_scores = sequence**2 * 4
    assert tracker.peak_bytes < one_head_of_scores


def test_selection():
    assert select_attention("auto", CPU, torch.float32) is sdpa_attention
    assert select_attention("reference", CPU, torch.float64) is reference_attention
    with pytest.raises(UserError, match=r"kernel\.attention=flash cannot be used: .* is cpu"):
        select_attention("flash", CPU, torch.bfloat16)
    with pytest.raises(UserError, match="set precision=bf16"):
        select_attention("flash", torch.device("cuda"), torch.float32)
