"""Sinks of a whole block: their gradient reaches autograd once, whatever the chunks."""

import pytest
import torch
from torch import nn

from mst_train.attention.select import CpuKernel, TiledKernel
from mst_train.mst import (
    ATTENTION,
    Offload,
    Scores,
    attend,
    block_fused,
    mini_sequence_block,
    recompute_block,
)
from mst_train.mst.sinks import sinks_gradient

CPU = torch.device("cpu")
HIDDEN, HEADS, SEQUENCE = 16, 4, 17


class Block(nn.Module):
    def __init__(self, kernel=None):
        super().__init__()
        self.query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.output = nn.Linear(HIDDEN, HIDDEN)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.kernel = kernel or CpuKernel()

    def before_attention(self, x, *, queries=True):
        q, k, v = self.query_key_value(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        return q if queries else None, k, v

    def after_attention(self, x, out, *, values=True):
        return x, self.output(out.flatten(2))

    def forward(self, x):
        q, k, v = self.before_attention(x)
        return torch.add(*self.after_attention(x, attend(self.kernel, q, k, v, None, self.sinks)))


def make_block(dtype=torch.float64, **options):
    torch.manual_seed(0)
    block = Block(**options).to(dtype)
    return block, torch.randn(2, SEQUENCE, HIDDEN, dtype=dtype)


def gradients(block, x, run):
    x = x.clone().requires_grad_()
    block.zero_grad()
    y = run(block, x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in block.parameters())]


def mini(chunk_tokens, sinks=lambda block: block.sinks, **options):
    def run(block, x):
        options["chunk_tokens"] = chunk_tokens
        return mini_sequence_block(block, block.kernel, x, sinks=sinks(block), **options)

    return run


@pytest.mark.parametrize("keep", [(), (ATTENTION,)])
@pytest.mark.parametrize("offload", [None, Offload(CPU)], ids=["device", "host"])
@pytest.mark.parametrize("chunk_tokens", [2, 10, 1000])
@pytest.mark.parametrize("scores", [Scores(), Scores(window=6)], ids=str)
def test_chunks(scores, chunk_tokens, offload, keep):
    block, x = make_block(kernel=TiledKernel(scores))
    expected = gradients(block, x, Block.__call__)
    for run in (
        mini(chunk_tokens, offload=offload, keep=keep),
        lambda block, x: recompute_block(block, x, keep=keep, offload=offload),
    ):
        actual = gradients(block, x, run)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_their_gradient_comes_once():
    block, x = make_block()
    seen = []
    block.sinks.register_hook(lambda gradient: seen.append(gradient.clone()))
    gradients(block, x, Block.__call__)
    gradients(block, x, mini(4))
    assert len(seen) == 2
    torch.testing.assert_close(*seen, rtol=1e-12, atol=1e-12)


def test_any_tensor_may_be_sinks():
    """Of a type of its own, and computed from a parameter."""
    block, x = make_block()
    expected = gradients(block, x, Block.__call__)
    actual = gradients(block, x, mini(4, lambda block: (3 * block.sinks.float().double()) / 3))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_frozen_sinks():
    block, x = make_block()
    block.sinks.requires_grad_(False)
    expected = gradients(block, x, Block.__call__)
    torch.testing.assert_close(gradients(block, x, mini(4)), expected, rtol=1e-12, atol=1e-12)
    assert block.sinks.grad is None


def test_sinks_alone_get_gradients():
    block, x = make_block()
    expected = gradients(block, x, Block.__call__)
    block.requires_grad_(False)
    block.sinks.requires_grad_(True)
    actual = torch.autograd.grad(mini(4)(block, x).square().sum(), block.sinks)
    torch.testing.assert_close(actual[0], expected[2], rtol=1e-12, atol=1e-12)


def test_sums_over_chunks_in_fp32(monkeypatch):
    block, x = make_block(torch.bfloat16)
    others = []

    def noting(*arguments):
        others.append(arguments[-1])
        return sinks_gradient(*arguments)

    monkeypatch.setattr(block_fused, "sinks_gradient", noting)
    gradients(block, x, mini(10))
    assert others[0] is None
    assert [other.dtype for other in others[1:]] == [torch.float32] * 3


def test_a_change_in_place_is_seen():
    block, x = make_block()
    y = mini(4)(block, x.requires_grad_())
    with torch.no_grad():
        block.sinks.add_(1)
    with pytest.raises(RuntimeError, match=r"sinks \(4,\) was changed in place"):
        y.sum().backward()
