"""Sliding windows, capped and rescaled scores: every kernel, whole and in chunks of rows.

``formula`` is attention with all of it, by plain operations on the whole score matrix.
"""

import pytest
import torch
from formula import (
    DOCUMENTS,
    SCORES,
    assert_same,
    in_chunks,
    make_documents,
    make_inputs,
    whole,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mst_train.attention import cpu as kernels_cpu
from mst_train.attention import select_attention
from mst_train.attention import tiled as kernels_tiled
from mst_train.attention.select import (
    KERNELS,
    PACKAGES,
    CpuKernel,
    KernelAttention,
    ReferenceKernel,
    SdpaAttention,
    TiledKernel,
)
from mst_train.errors import UserError
from mst_train.memory.tracker import MemoryTracker
from mst_train.mst import Scores
from mst_train.mst.attention_chunk import attend_chunk, attend_chunk_backward

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in each direction, the last ones shorter."""
    monkeypatch.setattr(kernels_tiled, "TILES", {"cpu": (4, 3), "cuda": (4, 3)})
    monkeypatch.setattr(kernels_cpu, "WINDOW_TILE", 5)


# --- kernels on whole sequences ------------------------------------------------------------------


@pytest.mark.parametrize("cu_seqlens", DOCUMENTS)
@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("kernel", [CpuKernel, TiledKernel, ReferenceKernel])
def test_kernels_are_the_formula(kernel, heads, scores, cu_seqlens):
    q, k, v, dout = inputs = make_inputs(*heads)
    documents = make_documents(cu_seqlens)
    out, lse = kernel(scores).forward(q, k, v, documents)
    gradients = kernel(scores).backward(dout, q, k, v, out, lse, documents)
    assert_same((out, lse, *gradients), whole(inputs, scores, cu_seqlens))


@pytest.mark.parametrize("scores", [s for s in SCORES if s.window], ids=str)
@pytest.mark.parametrize("kernel", [CpuKernel, TiledKernel, ReferenceKernel])
@pytest.mark.parametrize("first", [1, 6, 12])
def test_fewer_queries_are_those_of_the_last_keys(kernel, scores, first):
    q, k, v, dout = make_inputs()
    dout[:, :first] = 0
    expected_out, expected_lse, dq, dk, dv = whole((q, k, v, dout), scores)
    inputs = q[:, first:], k, v
    out, lse = kernel(scores).forward(*inputs)
    gradients = kernel(scores).backward(dout[:, first:], *inputs, out, lse)
    expected = expected_out[:, first:], expected_lse[:, :, first:], dq[:, first:], dk, dv
    assert_same((out, lse, *gradients), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("kernel", [CpuKernel, TiledKernel])
def test_other_types(kernel, scores, dtype):
    inputs = [t.to(dtype) for t in make_inputs()]
    q, k, v, dout = inputs
    out, lse = kernel(scores).forward(q, k, v)
    gradients = kernel(scores).backward(dout, q, k, v, out, lse)
    expected = whole([t.double() for t in inputs], scores)
    assert lse.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for actual, truth in zip((out, lse, *gradients), expected, strict=True):
        torch.testing.assert_close(actual.double(), truth, rtol=tolerance, atol=tolerance)
    assert {t.dtype for t in (out, *gradients)} == {dtype}


@pytest.mark.parametrize("scores", [Scores(window=16), Scores(softcap=5.0)], ids=str)
@pytest.mark.parametrize("name", ["cpu", "tiled"])
def test_no_score_matrix_is_held(name, scores, monkeypatch):
    monkeypatch.setattr(kernels_tiled, "TILES", {"cpu": (16, 32)})
    q, k, v, dout = make_inputs(4, 2, 512, 16, batch=1, dtype=torch.float32)
    kernel = KERNELS[name](scores)
    with MemoryTracker() as tracker:
        out, lse = kernel.forward(q, k, v)
        kernel.backward(dout, q, k, v, out, lse)
    one_head_of_scores = 512**2 * 4
    assert tracker.peak_bytes < 0.5 * one_head_of_scores


# --- chunks of rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("cu_seqlens", DOCUMENTS)
@pytest.mark.parametrize("rows_at_once", [1, 3, 4, 12, 13])
@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("kernel", [CpuKernel, TiledKernel, ReferenceKernel])
def test_chunks_of_rows(kernel, scores, rows_at_once, cu_seqlens):
    inputs = make_inputs()
    actual = in_chunks(kernel(scores), inputs, make_documents(cu_seqlens), rows_at_once)
    assert_same(actual, whole(inputs, scores, cu_seqlens))


@st.composite
def packed(draw, longest=12):
    """(batch, sequence, cu_seqlens): documents anywhere, none across two rows."""
    batch, sequence = draw(st.integers(1, 3)), draw(st.integers(1, longest))
    inner = draw(st.sets(st.integers(0, batch * sequence)))
    return batch, sequence, sorted({*inner, *range(0, batch * sequence + 1, sequence)})


@given(
    packed(),
    st.sampled_from([CpuKernel, TiledKernel]),
    st.integers(1, 13),
    st.integers(1, 13),
    st.sampled_from([None, 2.0]),
)
@settings(max_examples=100)
def test_any_chunks_documents_and_window(packed, kernel, rows_at_once, window, softcap):
    batch, sequence, cu_seqlens = packed
    scores = Scores(window, softcap)
    inputs = make_inputs(4, 2, sequence, 4, batch)
    actual = in_chunks(kernel(scores), inputs, make_documents(cu_seqlens), rows_at_once)
    assert_same(actual, whole(inputs, scores, cu_seqlens))


def test_a_chunk_reads_one_window_before_it_and_no_more():
    lengths = []

    class Recording(CpuKernel):
        def forward(self, q, k, v, documents=None, causal=True):
            assert causal
            lengths.append((q.shape[1], k.shape[1]))
            return super().forward(q, k, v, documents, causal)

    q, k, v, _ = make_inputs(sequence=40)
    for start in (0, 8, 16, 32):
        rows = slice(start, start + 8)
        attend_chunk(Recording(Scores(window=5)), q[:, rows], k, v, rows, None)
    assert lengths == [(8, 8), (8, 12), (8, 12), (8, 12)]


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_chunks_memory_does_not_grow_with_what_is_before_it(softcap):
    peaks = []
    for sequence in (256, 2048):
        q, k, v, dout = make_inputs(sequence=sequence, batch=1, dtype=torch.float32)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        rows = slice(sequence - 32, sequence)
        kernel = CpuKernel(Scores(window=16, softcap=softcap))
        with MemoryTracker() as tracker:
            out, lse = attend_chunk(kernel, q[:, rows], k, v, rows, None)
            parts = (q[:, rows], k, v, out, lse, rows, None, dk, dv)
            attend_chunk_backward(kernel, dout[:, rows], *parts)
        peaks.append(tracker.peak_bytes)
    assert peaks[0] == peaks[1]


# --- choosing ------------------------------------------------------------------------------------


def test_each_layer_gets_its_own_kernel_of_the_same_backend():
    for name in ("auto", "cpu", "tiled", "reference"):
        attention = select_attention(name, CPU, torch.float64)
        assert attention.of(Scores()) is attention
        other = attention.of(Scores(window=3))
        assert type(other.kernel) is type(attention.kernel)
        assert other.kernel.scores == Scores(window=3)
        assert other.of(Scores()).kernel.scores == Scores()


def test_one_kernel_alone_does_not_pretend_to_be_another():
    attention = KernelAttention(CpuKernel(Scores(softcap=2.0)))
    with pytest.raises(ValueError, match=r"softcap=2\.0"):
        attention.of(Scores())


@pytest.mark.parametrize(
    ("name", "scores", "message"),
    [
        ("sdpa", Scores(window=7), r"no sliding window, and model\.sliding_window=7: set kernel"),
        ("sdpa", Scores(softcap=2.0), r"does not cap scores, and model\.attention_softcap=2\.0"),
        ("cudnn", Scores(window=7), "no sliding window"),
        ("cudnn", Scores(softcap=2.0), "does not cap scores"),
        ("torch_flash", Scores(softcap=2.0), "does not cap scores"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(name, scores, message):
    device = CPU if name == "sdpa" else torch.device("cuda")
    attention = select_attention(name, device, torch.bfloat16)
    with pytest.raises(UserError, match=rf"kernel\.attention={name} cannot be used: .*{message}"):
        attention.of(scores)


@pytest.mark.parametrize(
    ("dtype", "scores", "installed", "expected"),
    [
        (torch.bfloat16, Scores(), (), "cudnn torch_flash"),
        (torch.float16, Scores(scale=0.5), ("flash_attn",), "cudnn flash_attn torch_flash"),
        (torch.bfloat16, Scores(window=8), (), "torch_flash"),
        (torch.bfloat16, Scores(window=8), ("flash_attn_3",), "flash_attn_3 torch_flash"),
        (torch.bfloat16, Scores(8, 8.0), ("flash_attn", "flash_attn_4"), "flash_attn_4 flash_attn"),
        (torch.bfloat16, Scores(8, 8.0), (), TiledKernel),
        (torch.float32, Scores(window=8), ("flash_attn",), TiledKernel),
        (torch.float32, Scores(softcap=8.0), ("flash_attn",), TiledKernel),
    ],
)
def test_what_is_measured_on_cuda(monkeypatch, dtype, scores, installed, expected):
    for name in PACKAGES:
        problem = None if name in installed else "not installed"
        monkeypatch.setitem(PACKAGES, name, lambda device, scores, problem=problem: problem)
    kernel = select_attention("auto", torch.device("cuda"), dtype, scores).kernel
    assert kernel.scores == scores
    if isinstance(expected, str):
        assert list(kernel.candidates) == expected.split()
        assert all(type(one) is KERNELS[name] for name, one in kernel.candidates.items())
        assert all(one.scores == scores for one in kernel.candidates.values())
    else:
        assert type(kernel) is expected


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_what_is_deterministic_on_cuda(monkeypatch, deterministic):
    cuda = torch.device("cuda")
    for name in PACKAGES:
        monkeypatch.setitem(PACKAGES, name, lambda device, scores: None)
    kernel = select_attention("auto", cuda, torch.bfloat16).kernel
    assert list(kernel.candidates) == ["flash_attn_4", "flash_attn_3", "flash_attn", "torch_flash"]
    with pytest.raises(UserError, match=r"cudnn cannot be used: .*train\.deterministic=true"):
        select_attention("cudnn", cuda, torch.bfloat16)


def test_what_is_not_measured_on_cuda():
    assert isinstance(select_attention("auto", torch.device("cuda"), torch.float32), SdpaAttention)


# --- kernels for CUDA, as far as they can be checked without it ----------------------------------


@pytest.mark.parametrize("cu_seqlens", [None, [0, 13, 20, 26]])
@pytest.mark.parametrize("name", ["torch_flash", "cudnn"])
@pytest.mark.parametrize("keys", [13, 17])
def test_torchs_kernels_take_scales_and_windows(name, cu_seqlens, keys):
    """Without a device: torch's own shape functions of these operators."""
    if keys > 13 and (cu_seqlens or name == "cudnn"):
        pytest.skip("never asked for")
    scores = Scores(window=5 if name == "torch_flash" else None, scale=0.5)
    documents = make_documents(cu_seqlens)
    q = torch.empty(2, 13, 4, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, keys, 2, 64, dtype=torch.bfloat16, device="meta")
    kernel = KERNELS[name](scores)
    out, lse = kernel.forward(q, k, k, documents)
    assert (out.shape, lse.shape) == (q.shape, (2, 4, 13))
    gradients = kernel.backward(q, q, k, k, out, lse, documents)
    assert [g.shape for g in gradients] == [q.shape, k.shape, k.shape]
