"""Attention by plain operations on the whole score matrix, and what tests of kernels share."""

import math
from itertools import pairwise

import torch

from mst_train.mst import Documents, Scores
from mst_train.mst.attention_chunk import attend_chunk, attend_chunk_backward
from mst_train.mst.sinks import sinks_gradient

BATCH, SEQUENCE = 2, 13
SCORES = [
    Scores(window=4),
    Scores(window=1),
    Scores(window=SEQUENCE),
    Scores(window=1000),
    Scores(softcap=1.5),
    Scores(scale=0.7),
    Scores(window=5, softcap=1.5, scale=0.7),
]
DOCUMENTS = [None, [0, 4, 5, 13, 26], [0, 13, 14, 20, 26]]


def make_inputs(heads=4, kv_heads=2, sequence=SEQUENCE, size=6, batch=BATCH, dtype=torch.float64):
    """q, k, v and the gradient of the result."""
    torch.manual_seed(0)
    q, dout = torch.randn(2, batch, sequence, heads, size, dtype=dtype)
    k, v = torch.randn(2, batch, sequence, kv_heads, size, dtype=dtype)
    return q, k, v, dout


def make_documents(cu_seqlens):
    return cu_seqlens and Documents(torch.tensor(cu_seqlens, dtype=torch.int32))


def formula(q, k, v, scores, cu_seqlens=None, sinks=None):
    """(out, lse); with sinks one more column of scores, whose probability nobody reads."""
    batch, sequence, heads, size = q.shape
    cu_seqlens = cu_seqlens or [i * sequence for i in range(batch + 1)]
    owners = torch.tensor([i for i, (a, b) in enumerate(pairwise(cu_seqlens)) for _ in range(a, b)])
    owners = owners.view(batch, 1, sequence)
    places = torch.arange(sequence)
    distance = places[:, None] - places
    seen = (distance >= 0) & (owners[..., None] == owners[..., None, :])
    if scores.window is not None:
        seen = seen & (distance < scores.window)
    k, v = (t.repeat_interleave(heads // k.shape[2], dim=2) for t in (k, v))
    products = torch.einsum("bqhe,bkhe->bhqk", q, k)
    products = products * (scores.scale or 1 / math.sqrt(size))
    if scores.softcap is not None:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    products = products.masked_fill(~seen, -math.inf)
    if sinks is not None:
        column = sinks[:, None, None].expand(batch, -1, sequence, 1)
        products = torch.cat([products, column], dim=-1)
    weights = products.softmax(-1)[..., :sequence]
    return torch.einsum("bhqk,bkhe->bqhe", weights, v), products.logsumexp(-1)


def differentiated(function, q, k, v, dout, *others):
    """(out, lse or None, dq, dk, dv, and the gradients of others that it takes)."""
    leaves = [t.clone().requires_grad_() for t in (q, k, v, *others)]
    out, lse = function(*leaves)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


def whole(inputs, scores, cu_seqlens=None):
    return differentiated(lambda q, k, v: formula(q, k, v, scores, cu_seqlens), *inputs)


def assert_same(actual, expected):
    torch.testing.assert_close(list(actual), list(expected), rtol=1e-12, atol=1e-12)


def in_chunks(kernel, inputs, documents, rows_at_once, sinks=None):
    """(out, lse, dq, dk, dv) chunk by chunk, as a block computes them; with sinks theirs too."""
    q, k, v, dout = inputs
    chunks = [
        slice(start, min(start + rows_at_once, q.shape[1]))
        for start in range(0, q.shape[1], rows_at_once)
    ]
    results = [attend_chunk(kernel, q[:, rows], k, v, rows, documents, sinks) for rows in chunks]
    sums = [
        torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32))
        if len(chunks) > 1
        else None
        for t in (k, v)
    ]
    gradients, dsinks = [], None
    for rows, (out, lse) in zip(reversed(chunks), reversed(results), strict=True):
        if sinks is not None:
            dsinks = sinks_gradient(sinks, dout[:, rows], out, lse, dsinks)
        parts = (q[:, rows], k, v, out, lse, rows, documents, *sums)
        gradients.insert(
            0, [t.clone() for t in attend_chunk_backward(kernel, dout[:, rows], *parts)]
        )
    return [
        torch.cat([out for out, _ in results], 1),
        torch.cat([lse for _, lse in results], 2),
        *(torch.cat(parts, 1) for parts in zip(*gradients, strict=True)),
        *(() if dsinks is None else (dsinks,)),
    ]
