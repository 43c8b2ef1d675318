"""The method's functions under autocast: they cast as linear layers do, also when run again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mst_train.attention.cpu import CpuKernel
from mst_train.mst import (
    attend,
    cross_entropy,
    gated_mlp,
    mini_sequence_block,
    mini_sequence_cross_entropy,
    mini_sequence_mlp,
    recompute_block,
)

TOKENS, HIDDEN, INTERMEDIATE, HEADS = 22, 16, 24, 4
BF16 = torch.bfloat16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.projection = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.gate, self.up = (nn.Linear(HIDDEN, INTERMEDIATE, bias=False) for _ in range(2))
        self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)
        self.seen = []

    def before_attention(self, x, *, queries=True):
        q, k, v = self.projection(self.norm(x)).unflatten(-1, (HEADS, -1)).chunk(3, -1)
        self.seen.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return (q if queries else None), k.float() * 0.5, v

    def after_attention(self, x, out, *, values=True):
        stream = x + out.flatten(2)
        weights = (self.gate.weight, self.up.weight, self.down.weight)
        return stream, mini_sequence_mlp(stream, *weights, chunk_tokens=5, values=values)

    def forward(self, x):
        q, k, v = self.before_attention(x)
        stream, branch = self.after_attention(x, attend(CpuKernel(), q, k, v))
        return stream + branch


RUNS = {
    "blocks": lambda block, x: mini_sequence_block(block, CpuKernel(), x, chunk_tokens=7),
    "attention again": lambda block, x: mini_sequence_block(
        block, CpuKernel(), x, chunk_tokens=7, keep=()
    ),
    "one piece": lambda block, x: recompute_block(block, x),
}


def gradients(run, block, x, autocast):
    block.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = run(block, x)
    y.square().sum().backward()
    return y, [x.grad, *(p.grad for p in block.parameters())]


@pytest.mark.parametrize("name", RUNS)
def test_a_block_runs_again_as_it_ran(name):
    torch.manual_seed(0)
    block, x = Block(), torch.randn(1, TOKENS, HIDDEN)
    _, exact = gradients(lambda block, x: block(x), block, x, autocast=False)
    _, plain = gradients(lambda block, x: block(x), block, x, autocast=True)
    block.seen.clear()
    y, actual = gradients(RUNS[name], block, x, autocast=True)
    assert y.dtype == torch.float32 and set(block.seen) == {(BF16, True)}
    assert not torch.is_autocast_enabled("cpu")
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - e).norm() <= 1.5 * (p - e).norm() + 1e-3 * e.norm()
        assert (a - e).norm() > 1e-5 * e.norm()


@pytest.mark.parametrize("name", ["blocks", "one piece"])
def test_the_backward_is_the_forwards_whatever_surrounds_it(name):
    torch.manual_seed(0)
    block, x = Block(), torch.randn(1, TOKENS, HIDDEN)
    y = RUNS[name](block, x)
    block.seen.clear()
    with torch.autocast("cpu", BF16):
        y.sum().backward()
    assert set(block.seen) == {(torch.float32, False)}
    inside = block.projection.weight.grad.clone()
    block.zero_grad()
    RUNS[name](block, x).sum().backward()
    if name == "blocks":  # whose backward is one function; the other's is autograd's own graph
        assert torch.equal(block.projection.weight.grad, inside)


def test_a_weight_used_before_and_after_a_block_gets_both_gradients():
    """Copies that a block casts without gradients serve nobody who wants gradients."""
    torch.manual_seed(0)
    block, x = Block(), torch.randn(1, TOKENS, HIDDEN)

    def run(block, x):
        return F.linear(RUNS["blocks"](block, x), block.down.weight @ block.up.weight)

    _, actual = gradients(run, block, x, autocast=True)
    _, exact = gradients(run, block, x, autocast=False)
    for a, e in zip(actual, exact, strict=True):
        assert (a - e).norm() < 0.05 * e.norm()


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
def test_the_mlp_and_the_head(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, HIDDEN), *[(INTERMEDIATE, HIDDEN)] * 2, (HIDDEN, INTERMEDIATE)]
    tensors = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    labels = torch.arange(TOKENS) % INTERMEDIATE
    for ours, plain in (
        (lambda: mini_sequence_mlp(*tensors, chunk_tokens=7), lambda: gated_mlp(*tensors)),
        (
            lambda: mini_sequence_cross_entropy(*tensors[:2], labels, chunk_tokens=7)[0],
            lambda: cross_entropy(*tensors[:2], labels)[0],
        ),
    ):
        with torch.autocast("cpu", BF16):
            expected, actual = plain(), ours()
        assert actual.dtype == expected.dtype
        cast = BF16 if dtype == torch.float32 else dtype
        tolerance = {BF16: 3e-2, torch.float64: 1e-12}[cast]
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        used = tensors if actual.ndim else tensors[:2]
        for a, e in zip(
            torch.autograd.grad(actual.sum(), used),
            torch.autograd.grad(expected.sum(), used),
            strict=True,
        ):
            assert a.dtype == dtype
            assert (a - e).norm() <= tolerance * e.norm()
