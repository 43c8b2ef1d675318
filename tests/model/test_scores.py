"""Sliding windows, capped and rescaled scores: every kernel, whole and in chunks of rows.

``formula`` is attention with all of it, by plain operations on the whole score matrix.
"""

import math
import sys
from itertools import pairwise, product
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mst_train.errors import UserError
from mst_train.memory.tracker import MemoryTracker
from mst_train.model import kernels_cpu, kernels_tiled, select_attention
from mst_train.model.attention import (
    KERNELS,
    CpuKernel,
    FlashAttnKernel,
    KernelAttention,
    ReferenceKernel,
    TiledKernel,
)
from mst_train.mst import Documents, Scores
from mst_train.mst.attention_rows import attend_rows, attend_rows_backward

CPU = torch.device("cpu")
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


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in each direction, the last ones shorter."""
    monkeypatch.setattr(kernels_tiled, "TILES", {"cpu": (4, 3), "cuda": (4, 3)})
    monkeypatch.setattr(kernels_cpu, "WINDOW_TILE", 5)


def make_inputs(heads=4, kv_heads=2, sequence=SEQUENCE, size=6, batch=BATCH, dtype=torch.float64):
    """q, k, v and the gradient of the result."""
    torch.manual_seed(0)
    q, dout = torch.randn(2, batch, sequence, heads, size, dtype=dtype)
    k, v = torch.randn(2, batch, sequence, kv_heads, size, dtype=dtype)
    return q, k, v, dout


def make_documents(boundaries):
    return boundaries and Documents(torch.tensor(boundaries, dtype=torch.int32))


def formula(q, k, v, scores, boundaries=None):
    """(out, lse)."""
    batch, sequence, heads, size = q.shape
    boundaries = boundaries or [i * sequence for i in range(batch + 1)]
    owners = torch.tensor([i for i, (a, b) in enumerate(pairwise(boundaries)) for _ in range(a, b)])
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
    return torch.einsum("bhqk,bkhe->bqhe", products.softmax(-1), v), products.logsumexp(-1)


def differentiated(function, q, k, v, dout):
    """(out, lse or None, dq, dk, dv)."""
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = function(*leaves)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


def whole(inputs, scores, boundaries=None):
    return differentiated(lambda q, k, v: formula(q, k, v, scores, boundaries), *inputs)


def assert_same(actual, expected):
    torch.testing.assert_close(list(actual), list(expected), rtol=1e-12, atol=1e-12)


# --- kernels on whole sequences ------------------------------------------------------------------


@pytest.mark.parametrize("boundaries", DOCUMENTS)
@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("kernel", [CpuKernel, TiledKernel, ReferenceKernel])
def test_kernels_are_the_formula(kernel, heads, scores, boundaries):
    q, k, v, dout = inputs = make_inputs(*heads)
    documents = make_documents(boundaries)
    out, lse = kernel(scores).forward(q, k, v, documents)
    gradients = kernel(scores).backward(dout, q, k, v, out, lse, documents)
    assert_same((out, lse, *gradients), whole(inputs, scores, boundaries))


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
def test_no_score_matrix_is_held(name, scores):
    q, k, v, dout = make_inputs(4, 2, 512, 16, batch=1, dtype=torch.float32)
    kernel = KERNELS[name](scores)
    with MemoryTracker() as tracker:
        out, lse = kernel.forward(q, k, v)
        kernel.backward(dout, q, k, v, out, lse)
    one_head_of_scores = 512**2 * 4
    assert tracker.peak_bytes < 0.5 * one_head_of_scores


# --- chunks of rows ------------------------------------------------------------------------------


def in_chunks(kernel, inputs, documents, rows_at_once):
    """(out, lse, dq, dk, dv) chunk by chunk, as a block computes them."""
    q, k, v, dout = inputs
    chunks = [
        slice(start, min(start + rows_at_once, q.shape[1]))
        for start in range(0, q.shape[1], rows_at_once)
    ]
    results = [attend_rows(kernel, q[:, rows], k, v, rows, documents) for rows in chunks]
    sums = [torch.zeros_like(t) if len(chunks) > 1 else None for t in (k, v)]
    gradients = []
    for rows, (out, lse) in zip(reversed(chunks), reversed(results), strict=True):
        parts = (q[:, rows], k, v, out, lse, rows, documents, *sums)
        gradients.insert(
            0, [t.clone() for t in attend_rows_backward(kernel, dout[:, rows], *parts)]
        )
    return [
        torch.cat([out for out, _ in results], 1),
        torch.cat([lse for _, lse in results], 2),
        *(torch.cat(parts, 1) for parts in zip(*gradients, strict=True)),
    ]


@pytest.mark.parametrize("boundaries", DOCUMENTS)
@pytest.mark.parametrize("rows_at_once", [1, 3, 4, 12, 13])
@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("kernel", [CpuKernel, TiledKernel, ReferenceKernel])
def test_chunks_of_rows(kernel, scores, rows_at_once, boundaries):
    inputs = make_inputs()
    actual = in_chunks(kernel(scores), inputs, make_documents(boundaries), rows_at_once)
    assert_same(actual, whole(inputs, scores, boundaries))


@st.composite
def packed(draw, longest=12):
    """(batch, sequence, boundaries): documents anywhere, none across two rows."""
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
@settings(max_examples=100, deadline=None)
def test_any_chunks_documents_and_window(packed, kernel, rows_at_once, window, softcap):
    batch, sequence, boundaries = packed
    scores = Scores(window, softcap)
    inputs = make_inputs(4, 2, sequence, 4, batch)
    actual = in_chunks(kernel(scores), inputs, make_documents(boundaries), rows_at_once)
    assert_same(actual, whole(inputs, scores, boundaries))


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
        attend_rows(Recording(Scores(window=5)), q[:, rows], k, v, rows, None)
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
            out, lse = attend_rows(kernel, q[:, rows], k, v, rows, None)
            parts = (q[:, rows], k, v, out, lse, rows, None, dk, dv)
            attend_rows_backward(kernel, dout[:, rows], *parts)
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
    ("dtype", "scores", "capability", "installed", "expected"),
    [
        (torch.bfloat16, Scores(), (9, 0), False, "CudnnKernel"),
        (torch.bfloat16, Scores(), (8, 0), False, "TorchFlashKernel"),
        (torch.bfloat16, Scores(window=8), (9, 0), False, "TorchFlashKernel"),
        (torch.bfloat16, Scores(softcap=8.0), (9, 0), True, "FlashAttnKernel"),
        (torch.bfloat16, Scores(8, 8.0), (9, 0), True, "FlashAttnKernel"),
        (torch.bfloat16, Scores(8, 8.0), (9, 0), False, "TiledKernel"),
        (torch.float32, Scores(window=8), (9, 0), True, "TiledKernel"),
        (torch.float32, Scores(softcap=8.0), (9, 0), True, "TiledKernel"),
    ],
)
def test_automatic_choice_on_cuda(monkeypatch, dtype, scores, capability, installed, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    attention = select_attention("auto", torch.device("cuda"), dtype, scores)
    assert type(attention.kernel).__name__ == expected
    assert attention.kernel.scores == scores


# --- kernels for CUDA, as far as they can be checked without it ----------------------------------


@pytest.mark.parametrize("boundaries", [None, [0, 13, 20, 26]])
@pytest.mark.parametrize("name", ["torch_flash", "cudnn"])
@pytest.mark.parametrize("keys", [13, 17])
def test_torchs_kernels_take_scales_and_windows(name, boundaries, keys):
    """Without a device: torch's own shape functions of these operators."""
    if keys > 13 and (boundaries or name == "cudnn"):
        pytest.skip("never asked for")
    scores = Scores(window=5 if name == "torch_flash" else None, scale=0.5)
    documents = make_documents(boundaries)
    q = torch.empty(2, 13, 4, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, keys, 2, 64, dtype=torch.bfloat16, device="meta")
    kernel = KERNELS[name](scores)
    out, lse = kernel.forward(q, k, k, documents)
    assert (out.shape, lse.shape) == (q.shape, (2, 4, 13))
    gradients = kernel.backward(q, q, k, k, out, lse, documents)
    assert [g.shape for g in gradients] == [q.shape, k.shape, k.shape]


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in for the package: its operators' names, arguments and conventions, by formula.

    Windows count from the last query at the last key; -1 is no bound; a softcap of 0 is none.
    """
    interface = ModuleType("flash_attn.flash_attn_interface")

    def kernel(softmax_scale, causal, window_size_left, window_size_right, softcap):
        assert causal
        assert window_size_right == (-1 if window_size_left == -1 else 0)
        window = None if window_size_left == -1 else window_size_left + 1
        return ReferenceKernel(Scores(window, softcap or None, softmax_scale))

    def forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    ):  # fmt: skip
        assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
        chosen = kernel(softmax_scale, causal, window_size_left, window_size_right, softcap)
        return *chosen.forward(q, k, v), None, None

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, alibi_slopes, deterministic) == (0.0, None, False)
        assert softmax_lse.is_contiguous()
        chosen = kernel(softmax_scale, causal, window_size_left, window_size_right, softcap)
        for place, gradient in zip(
            (dq, dk, dv), chosen.backward(dout, q, k, v, out, softmax_lse), strict=True
        ):
            place.copy_(gradient)

    def of_packed(function, tensors, boundaries, options):
        offsets = boundaries.tolist()
        return function(*(t[None] for t in tensors), documents=make_documents(offsets), **options)

    def varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False,
    ):  # fmt: skip
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        chosen = kernel(softmax_scale, causal, window_size_left, window_size_right, softcap)
        out, lse = of_packed(chosen.forward, (q, k, v), cu_seqlens_q, {})
        return out[0], lse[0], None, None

    def varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        chosen = kernel(softmax_scale, causal, window_size_left, window_size_right, softcap)
        tensors = (dout, q, k, v, out, softmax_lse)
        gradients = of_packed(chosen.backward, tensors, cu_seqlens_q, {})
        for place, gradient in zip((dq, dk, dv), gradients, strict=True):
            place.copy_(gradient[0])

    interface._flash_attn_forward = forward
    interface._flash_attn_backward = backward
    interface._flash_attn_varlen_forward = varlen_forward
    interface._flash_attn_varlen_backward = varlen_backward
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)


@pytest.mark.parametrize(("boundaries", "scores"), list(product(DOCUMENTS, [*SCORES, Scores()])))
def test_flash_attn_is_handed_what_it_expects(flash_attn, scores, boundaries):
    inputs = make_inputs()
    expected = whole(inputs, scores, boundaries)
    kernel, documents = FlashAttnKernel(scores), make_documents(boundaries)
    q, k, v, dout = inputs
    out, lse = kernel.forward(q, k, v, documents)
    assert_same((out, lse, *kernel.backward(dout, q, k, v, out, lse, documents)), expected)
    if scores.window is not None:
        assert_same(in_chunks(kernel, inputs, documents, 4), expected)
