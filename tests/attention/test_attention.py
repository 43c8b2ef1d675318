"""Attention backends against the formula, and what they hold in memory."""

import math
from itertools import pairwise

import pytest
import torch

from mst_train.attention.select import KERNELS, CpuKernel, ReferenceKernel, select_attention
from mst_train.errors import UserError
from mst_train.memory.tracker import MemoryTracker
from mst_train.mst import Documents, Scores

CPU = torch.device("cpu")
BACKENDS = {
    name: select_attention(name, CPU, torch.float64) for name in ("reference", "cpu", "sdpa")
}


def make_inputs(heads, kv_heads, sequence=13, size=6, batch=2, dtype=torch.float64):
    torch.manual_seed(0)
    q = torch.randn(batch, sequence, heads, size, dtype=dtype)
    k, v = torch.randn(2, batch, sequence, kv_heads, size, dtype=dtype)
    return [t.clone().requires_grad_() for t in (q, k, v)]


def make_documents(cu_seqlens):
    return cu_seqlens and Documents(torch.tensor(cu_seqlens, dtype=torch.int32))


def textbook(q, k, v, cu_seqlens):
    """Row by row and head by head; boundaries of documents in the flattened batch."""
    q_, k_, v_ = (t.flatten(0, 1) for t in (q, k, v))
    group = q.shape[2] // k.shape[2]
    rows = []
    for start, end in pairwise(cu_seqlens):
        for s in range(start, end):
            for h in range(q.shape[2]):
                keys, values = k_[start : s + 1, h // group], v_[start : s + 1, h // group]
                weights = (keys @ q_[s, h] / math.sqrt(q.shape[3])).softmax(0)
                rows.append(weights @ values)
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 4, 5, 13, 26], [0, 13, 14, 20, 26]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (1, 1)])
@pytest.mark.parametrize("name", BACKENDS)
def test_backends_are_the_formula(name, heads, kv_heads, cu_seqlens):
    inputs = make_inputs(heads, kv_heads)
    dout = torch.randn_like(inputs[0])
    expected = textbook(*inputs, cu_seqlens or [0, 13, 26])
    actual = BACKENDS[name](*inputs, make_documents(cu_seqlens))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, dout),
        torch.autograd.grad(expected, inputs, dout),
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize("sequence", [1, 64, 200])
def test_lengths(sequence):
    inputs = make_inputs(4, 2, sequence)
    torch.testing.assert_close(
        BACKENDS["cpu"](*inputs), BACKENDS["reference"](*inputs), rtol=1e-12, atol=1e-12
    )


def test_kernels_give_the_log_sum_exp():
    q, k, v = (t.detach() for t in make_inputs(1, 1, batch=1))
    future = torch.ones(13, 13).triu(1).bool()
    scores = (q[0, :, 0] @ k[0, :, 0].t() / math.sqrt(6)).masked_fill(future, -math.inf)
    for kernel in (CpuKernel(), ReferenceKernel()):
        _, lse = kernel.forward(q, k, v, None)
        torch.testing.assert_close(lse.flatten(), scores.logsumexp(-1))


@pytest.mark.parametrize("name", ["torch_flash", "cudnn"])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 13, 20, 26]])
def test_cuda_kernels_take_and_give_the_right_shapes(name, cu_seqlens):
    """Without a device: torch's own shape functions of these operators."""
    documents = make_documents(cu_seqlens)
    q = torch.empty(2, 13, 4, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, 13, 2, 64, dtype=torch.bfloat16, device="meta")
    kernel = KERNELS[name](Scores())
    out, lse = kernel.forward(q, k, k, documents)
    assert out.shape == q.shape
    assert out.is_contiguous()
    gradients = kernel.backward(q, q, k, k, out, lse, documents)
    assert [g.shape for g in gradients] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("name", ["cpu", "sdpa"])
def test_no_score_matrix_is_held(name):
    sequence, heads, size = 512, 4, 16
    inputs = make_inputs(heads, 2, sequence, size, batch=1, dtype=torch.float32)
    with MemoryTracker() as tracker:
        BACKENDS[name](*inputs).sum().backward()
    one_head_of_scores = sequence**2 * 4
    assert tracker.peak_bytes < one_head_of_scores


def test_selection():
    assert isinstance(select_attention("auto", CPU, torch.float32).kernel, CpuKernel)
    assert isinstance(select_attention("reference", CPU, torch.float64).kernel, ReferenceKernel)
    cuda = torch.device("cuda")
    for name, device, dtype, message in (
        ("flash_attn", CPU, torch.bfloat16, r"kernel\.attention=flash_attn cannot .* is cpu"),
        ("cudnn", CPU, torch.bfloat16, "is cpu"),
        ("cpu", cuda, torch.float32, "it runs on the CPU"),
        ("torch_flash", cuda, torch.float32, "set precision=bf16"),
    ):
        with pytest.raises(UserError, match=message):
            select_attention(name, device, dtype)
