"""Attention of one chunk at a time: the numbers of the whole sequence at once."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mst_train.attention.select import CpuKernel, ReferenceKernel
from mst_train.mst import Documents
from mst_train.mst import attention_chunk as chunked
from mst_train.mst.attention_chunk import attend_chunk, attend_chunk_backward
from mst_train.mst.chunking import chunk_slices

KERNELS = [CpuKernel, ReferenceKernel]

BOUNDARIES = {  # of two rows of 12 tokens; chunks of 4 begin at 4 and 8
    "none": None,
    "rows": [0, 12, 24],
    "at chunks' borders": [0, 4, 8, 12, 16, 24],
    "across several chunks": [0, 3, 12, 13, 23, 24],
    "beside chunks' borders": [0, 5, 7, 9, 12, 15, 19, 24],
    "of one token": [*range(13), 16, 17, 24],
}


class NothingLeftOf(CpuKernel):
    """Fails where a call's rectangle has no queries or no keys."""

    def forward(self, q, k, v, documents=None, causal=True):
        assert q.numel()
        assert k.numel()
        return super().forward(q, k, v, documents, causal)


def make_inputs(batch=2, sequence=12, heads=4, kv_heads=2, size=3, dtype=torch.float64):
    torch.manual_seed(0)
    q, dout = torch.randn(2, batch, sequence, heads, size, dtype=dtype)
    k, v = torch.randn(2, batch, sequence, kv_heads, size, dtype=dtype)
    return q, k, v, dout


def make_documents(cu_seqlens):
    return cu_seqlens and Documents(torch.tensor(cu_seqlens, dtype=torch.int32))


def whole(inputs, documents):
    """(out, lse, dq, dk, dv) by the formula, the whole sequence at once."""
    q, k, v, dout = inputs
    out, lse = ReferenceKernel().forward(q, k, v, documents)
    return out, lse, *ReferenceKernel().backward(dout, q, k, v, out, lse, documents)


def in_chunks(kernel, inputs, documents, length):
    """The same, chunk by chunk: what a chunk must not read is NaN while it is computed."""
    q, k, v, dout = inputs
    batch, sequence, heads, _ = q.shape
    chunks = list(chunk_slices(sequence, length))
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.empty_like(q), torch.empty(batch, heads, sequence, dtype=dtype)
    for chunk in chunks:
        out[:, chunk], lse[..., chunk] = attend_chunk(
            kernel, q[:, chunk], *(without(t, chunk.stop) for t in (k, v)), chunk, documents
        )
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    sums = [torch.zeros_like(t, dtype=dtype) for t in (k, v)]
    for chunk in reversed(chunks):
        dq[:, chunk], dk[:, chunk], dv[:, chunk] = attend_chunk_backward(
            kernel,
            dout[:, chunk],
            q[:, chunk],
            *(without(t, chunk.stop) for t in (k, v)),
            out[:, chunk],
            lse[..., chunk],
            chunk,
            documents,
            *(sums if len(chunks) > 1 else [None, None]),
        )
    return out, lse, dq, dk, dv


def without(tensor, stop):
    tensor = tensor.clone()
    tensor[:, stop:] = torch.nan
    return tensor


@pytest.mark.parametrize("length", [1, 4, 5, 11, 12])
@pytest.mark.parametrize("cu_seqlens", BOUNDARIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_whole_sequence(kernel, cu_seqlens, length):
    documents, inputs = make_documents(BOUNDARIES[cu_seqlens]), make_inputs()
    torch.testing.assert_close(
        in_chunks(kernel(), inputs, documents, length),
        whole(inputs, documents),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("keys_at_once", [1, 3, 4, 100])
@pytest.mark.parametrize("cu_seqlens", ["none", "across several chunks"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_keys_of_a_rectangle_in_portions(monkeypatch, kernel, cu_seqlens, keys_at_once):
    monkeypatch.setattr(kernel, "keys_at_once", keys_at_once)
    monkeypatch.setattr(chunked, "KEYS_AT_ONCE", keys_at_once)
    documents, inputs = make_documents(BOUNDARIES[cu_seqlens]), make_inputs()
    torch.testing.assert_close(
        in_chunks(kernel(), inputs, documents, 4),
        whole(inputs, documents),
        rtol=1e-12,
        atol=1e-12,
    )


def test_a_long_sequence_has_few_different_rectangles(monkeypatch):
    """A kernel that plans for each shape has a bounded number of plans, however long it is."""
    monkeypatch.setattr(CpuKernel, "keys_at_once", 35)
    monkeypatch.setattr(chunked, "KEYS_AT_ONCE", 35)
    shapes = {"forward": set(), "backward": set()}

    class Recording(CpuKernel):
        def forward(self, q, k, v, documents=None, causal=True):
            shapes["forward"].add((q.shape[1], k.shape[1], causal))
            return super().forward(q, k, v, documents, causal)

        def backward(self, dout, q, k, v, out, lse, documents=None, causal=True):
            shapes["backward"].add((q.shape[1], k.shape[1], causal))
            return super().backward(dout, q, k, v, out, lse, documents, causal)

    inputs = make_inputs(batch=1, sequence=10 * 37, heads=1, kv_heads=1)
    in_chunks(Recording(), inputs, None, 10)
    rectangles = {(10, 10, False), (10, 20, False), (10, 30, False)}
    assert shapes["forward"] == shapes["backward"] == {(10, 10, True), *rectangles}


def test_no_backward_of_a_kernel_has_more_keys_than_that(monkeypatch):
    monkeypatch.setattr(CpuKernel, "keys_at_once", 5)
    keys = []

    class Recording(CpuKernel):
        def backward(self, dout, q, k, v, out, lse, documents=None, causal=True):
            if not causal:
                keys.append(k.shape[1])
            return super().backward(dout, q, k, v, out, lse, documents, causal)

    in_chunks(Recording(), make_inputs(), None, 4)
    assert keys == [4, 4, 4]  # the 8 before the last chunk, then the 4 before the second


@st.composite
def packed(draw, longest=12):
    """(batch, sequence, cu_seqlens): documents anywhere, none across two rows."""
    batch, sequence = draw(st.integers(1, 3)), draw(st.integers(1, longest))
    inner = draw(st.sets(st.integers(0, batch * sequence)))
    return batch, sequence, sorted({*inner, *range(0, batch * sequence + 1, sequence)})


@given(
    packed(),
    st.sampled_from([(1, 1), (2, 1), (2, 2), (6, 2)]),
    st.integers(1, 13),
    st.integers(1, 9),
    st.booleans(),
)
@settings(max_examples=80)
def test_equals_the_whole_sequence_always(packed, heads, length, keys_at_once, confined):
    batch, sequence, cu_seqlens = packed
    documents = make_documents(cu_seqlens) if confined else None
    inputs = make_inputs(batch, sequence, *heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuKernel, "keys_at_once", keys_at_once)
        actual = in_chunks(NothingLeftOf(), inputs, documents, length)
    torch.testing.assert_close(actual, whole(inputs, documents), rtol=1e-11, atol=1e-11)


def test_scores_of_very_different_size():
    """Where one part of the keys has all the weight, the other's log-sum-exp does not overflow."""
    q, k, v, dout = make_inputs()
    for large in (k[:, :4], k[:, 4:8]):
        large *= 500
    inputs = q, k, v, dout
    expected = whole(inputs, None)
    assert expected[1].abs().max() > 500  # exp of it is beyond fp32's range
    torch.testing.assert_close(in_chunks(CpuKernel(), inputs, None, 4), expected)


def test_bf16_is_as_near_to_the_truth_as_the_whole_sequence_at_once(monkeypatch):
    """All gradients are summed over their parts in fp32. The factor leaves room for each part's
    being rounded to bf16 once."""
    monkeypatch.setattr(CpuKernel, "keys_at_once", 8)
    inputs = make_inputs(1, 256, heads=4, kv_heads=1, size=16, dtype=torch.bfloat16)
    truth = whole([t.double() for t in inputs], None)

    def errors(results):
        return [
            ((result.double() - true).norm() / true.norm()).item()
            for result, true in zip(results, truth, strict=True)
        ]

    at_once = errors(in_chunks(CpuKernel(), inputs, None, 256))
    chunks = errors(in_chunks(CpuKernel(), inputs, None, 8))
    for name, once, many in zip(["out", "lse", "dq", "dk", "dv"], at_once, chunks, strict=True):
        assert many < 1.5 * once + 1e-6, (name, once, many)


# --- documents as a chunk sees them --------------------------------------------------------------


@given(packed(), st.data())
def test_documents_inside(packed, data):
    """Each token of the chunk is in a document with those that it was in one with."""
    batch, sequence, cu_seqlens = packed
    start = data.draw(st.integers(0, sequence - 1))
    chunk = slice(start, data.draw(st.integers(start + 1, sequence)))
    inside = make_documents(cu_seqlens).inside(batch, sequence, chunk)
    owners = [
        index for index, (start, end) in enumerate(pairwise(cu_seqlens)) for _ in range(start, end)
    ]
    expected = torch.tensor(owners).view(batch, sequence)[:, chunk].flatten().tolist()
    cuts = [i for i, (a, b) in enumerate(pairwise(expected), start=1) if a != b]
    assert inside.cu_seqlens.tolist() == inside.offsets == [0, *cuts, len(expected)]
    assert inside.cu_seqlens.dtype == torch.int32
    assert inside.longest == max(expected.count(owner) for owner in expected)


@given(packed(), st.data())
def test_documents_around(packed, data):
    batch, sequence, cu_seqlens = packed
    token = data.draw(st.integers(0, batch * sequence - 1))
    expected = [(start, end) for start, end in pairwise(cu_seqlens) if start <= token < end]
    assert [make_documents(cu_seqlens).around(token)] == expected


def test_documents_inside_are_made_once():
    """Every block asks again."""
    documents = make_documents([0, 5, 12])
    assert documents.inside(1, 12, slice(4, 8)) is documents.inside(1, 12, slice(4, 8))
    assert documents.inside(1, 12, slice(4, 8)) is not documents.inside(1, 12, slice(4, 9))
