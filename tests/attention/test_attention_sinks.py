"""Attention sinks: what every kernel gives with them is the formula with one more column."""

import math
from dataclasses import replace

import pytest
import torch
from formula import (
    DOCUMENTS,
    SCORES,
    SEQUENCE,
    assert_same,
    differentiated,
    formula,
    in_chunks,
    make_documents,
    make_inputs,
)

from mst_train.attention.measure import Problem
from mst_train.attention.select import (
    CpuKernel,
    KernelAttention,
    ReferenceKernel,
    TiledKernel,
    select_attention,
)
from mst_train.errors import UserError
from mst_train.memory.tracker import MemoryTracker
from mst_train.mst import Documents, Scores, attend
from mst_train.mst.attention_chunk import attend_chunk, attend_chunk_backward
from mst_train.mst.sinks import join_sinks, sinks_gradient

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KERNELS = [CpuKernel, TiledKernel, ReferenceKernel]


def make_sinks(heads=4, dtype=torch.float64):
    return torch.randn(heads, generator=torch.Generator().manual_seed(7), dtype=dtype) + 1


def truth(inputs, sinks, scores=None, cu_seqlens=None):
    """(out, lse, dq, dk, dv, dsinks)."""
    return differentiated(
        lambda q, k, v, s: formula(q, k, v, scores or Scores(), cu_seqlens, s), *inputs, sinks
    )


@pytest.mark.parametrize("cu_seqlens", DOCUMENTS)
@pytest.mark.parametrize("scores", [Scores(), *SCORES], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients(kernel, scores, cu_seqlens):
    inputs, sinks, documents = make_inputs(), make_sinks(), make_documents(cu_seqlens)
    expected = truth(inputs, sinks, scores, cu_seqlens)
    leaves = [t.clone().requires_grad_() for t in (*inputs[:3], sinks)]
    out = attend(kernel(scores), *leaves[:3], documents, leaves[3])
    assert_same((out, *torch.autograd.grad(out, leaves, inputs[3])), (expected[0], *expected[2:]))


@pytest.mark.parametrize("rows_at_once", [1, 4, 5, SEQUENCE])
@pytest.mark.parametrize("cu_seqlens", DOCUMENTS)
@pytest.mark.parametrize("scores", [Scores(), Scores(window=5, softcap=1.5)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_in_chunks(kernel, scores, cu_seqlens, rows_at_once):
    """Where several results are merged sinks join once."""
    inputs, sinks = make_inputs(), make_sinks()
    actual = in_chunks(kernel(scores), inputs, make_documents(cu_seqlens), rows_at_once, sinks)
    assert_same(actual, truth(inputs, sinks, scores, cu_seqlens))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (5, 1)])
def test_heads(heads, kv_heads):
    inputs, sinks = make_inputs(heads, kv_heads), make_sinks(heads)
    assert_same(in_chunks(CpuKernel(), inputs, None, 4, sinks), truth(inputs, sinks))


def test_they_make_a_difference():
    """Each head's its own, and what they take is missing from the rest."""
    q, k, _, _ = make_inputs()
    ones = torch.ones_like(k)
    sinks = torch.tensor([-math.inf, -1.0, 0.0, 2.0], dtype=torch.float64)
    left = attend(CpuKernel(), q, k, ones, sinks=sinks)[..., 0]
    _, lse = CpuKernel().forward(q, k, ones)
    expected = lse.exp() / (lse.exp() + sinks[:, None].exp())
    assert_same([left.transpose(1, 2)], [expected])
    assert (left[:, :, 3] < left[:, :, 1]).all()


@pytest.mark.parametrize("sink", [-math.inf, -1e4, 1e4])
def test_extremes(sink):
    """Sinks that take nothing, and all."""
    inputs, sinks = make_inputs(), torch.full((4,), sink, dtype=torch.float64)
    out, lse, *gradients = in_chunks(CpuKernel(), inputs, None, 4, sinks)
    if sink < 0:
        expected = in_chunks(CpuKernel(), inputs, None, 4)
        assert_same((out, lse, *gradients[:3]), expected)
    else:
        assert (lse == sink).all()
        assert all((t == 0).all() for t in (out, *gradients[:3]))
    assert (gradients[3] == 0).all()


def test_a_query_that_sees_no_key():
    out, lse = torch.zeros(1, 2, 1, 3), torch.full((1, 1, 2), -math.inf)
    joined, total = join_sinks(out, lse, torch.tensor([0.5]))
    assert (joined == 0).all()
    assert (total == 0.5).all()
    gradient = sinks_gradient(torch.tensor([0.5]), torch.ones_like(out), joined, total)
    assert (gradient == 0).all()


@pytest.mark.parametrize("scores", [Scores(), Scores(window=40)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16(kernel, scores):
    """No worse than the formula in bf16, twice its error at most; sums of sinks in fp32."""
    inputs, sinks = make_inputs(sequence=96, size=16, dtype=torch.bfloat16), make_sinks().bfloat16()
    expected = truth([t.double() for t in inputs], sinks.double(), scores)
    plain = truth(inputs, sinks, scores)
    actual = in_chunks(kernel(scores), inputs, None, 32, sinks)
    assert actual[1].dtype == actual[5].dtype == torch.float32
    for mine, formulas, right in zip(actual, plain, expected, strict=True):
        assert (mine - right).norm() <= 2 * (formulas - right).norm() + 1e-5 * right.norm()


def test_sinks_of_another_type_than_the_queries():
    inputs, sinks = make_inputs(dtype=torch.float32), make_sinks().requires_grad_()
    q, k, v, dout = inputs
    out = attend(CpuKernel(), q, k, v, sinks=sinks)
    (gradient,) = torch.autograd.grad(out, sinks, dout)
    assert out.dtype == torch.float32
    assert gradient.dtype == torch.float64
    expected = truth([t.double() for t in inputs], sinks.detach())[5]
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def test_one_for_each_head():
    q, k, v, _ = make_inputs()
    with pytest.raises(ValueError, match=r"sinks \(1,\) for 4 query heads"):
        attend(CpuKernel(), q, k, v, sinks=make_sinks(1))


@pytest.mark.parametrize("keys", [32, 256, 1024])
def test_no_memory_that_grows_with_the_keys(keys):
    """A chunk of queries needs one array of its size, however many keys it sees."""
    q, dout = torch.randn(2, 1, 32, 4, 16)
    k, v = torch.randn(2, 1, keys, 2, 16)
    chunk = slice(keys - 32, keys)

    def peak(sinks):
        kernel, sums = CpuKernel(), [torch.zeros_like(t) for t in (k, v)]
        with MemoryTracker() as tracker:
            out, lse = attend_chunk(kernel, q, k, v, chunk, None, sinks)
            if sinks is not None:
                sinks_gradient(sinks, dout, out, lse)
            attend_chunk_backward(kernel, dout, q, k, v, out, lse, chunk, None, *sums)
        return tracker.peak_bytes

    more = peak(make_sinks(dtype=torch.float32)) - peak(None)
    assert more <= q.nbytes + 4 * q.nbytes // 16


@pytest.mark.parametrize("name", ["cpu", "tiled", "reference"])
def test_backends(name):
    inputs, sinks = make_inputs(), make_sinks()
    attention = select_attention(name, CPU, torch.float64).of(Scores(window=5, sinks=True))
    assert attention.kernel.scores == Scores(window=5, sinks=True)
    out = attention(*inputs[:3], None, sinks)
    assert_same([out], truth(inputs, sinks, Scores(window=5))[:1])


def test_sdpa_has_none():
    with pytest.raises(UserError, match=r"attention=sdpa .* model\.attention_sinks=true: set kern"):
        select_attention("sdpa", CPU, torch.float64).of(Scores(sinks=True))
    chosen = select_attention("auto", CUDA, torch.float32, Scores(sinks=True))
    assert isinstance(chosen, KernelAttention)
    assert isinstance(chosen.kernel, TiledKernel)


def test_they_choose_no_other_kernel():
    """What is measured for calls without sinks holds for calls with them, as it is the same."""
    problem = Problem(CPU, torch.bfloat16, 1, 64, 64, 4, 2, 16, Scores(window=5))
    with_sinks = replace(problem, scores=Scores(window=5, sinks=True))
    assert str(with_sinks.kind) == str(problem.kind)


def test_documents_as_they_come():
    """Boundaries beside rows' ends, in a batch of one row."""
    inputs, sinks = make_inputs(batch=1), make_sinks()
    offsets = [0, 1, 2, 9, SEQUENCE]
    documents = Documents(torch.tensor(offsets, dtype=torch.int32))
    actual = in_chunks(TiledKernel(), inputs, documents, 4, sinks)
    assert_same(actual, truth(inputs, sinks, None, offsets))
