"""What the FlashAttention packages' functions are handed, without the packages or a device.

Stand-ins have the packages' own arguments and conventions, and compute by the formula.
"""

import importlib.metadata
import sys
from itertools import product
from types import ModuleType

import pytest
import torch
from formula import DOCUMENTS, SCORES, assert_same, in_chunks, make_documents, make_inputs, whole

from mst_train.attention import select_attention
from mst_train.attention.cuda import flash
from mst_train.attention.select import (
    FlashAttn3Kernel,
    FlashAttn4Kernel,
    FlashAttnKernel,
    ReferenceKernel,
)
from mst_train.errors import UserError
from mst_train.mst import Scores

CUDA = torch.device("cuda")
HOPPER, BLACKWELL, CONSUMER, AMPERE = (9, 0), (10, 0), (12, 0), (8, 0)


def install(monkeypatch, name, **functions):
    """A module of this name, and the packages that it is in."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        module = ModuleType(".".join(parts[:end]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    flash.import_problem.cache_clear()


@pytest.fixture(autouse=True)
def forget_imports():
    flash.import_problem.cache_clear()
    yield
    flash.import_problem.cache_clear()


@pytest.fixture
def device_is(monkeypatch):
    """device_is((9, 0)): every device has this compute capability."""

    def set_capability(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    set_capability(HOPPER)
    return set_capability


def by_formula(softmax_scale, causal, left, right, softcap, unbounded):
    """The reference for FlashAttention's arguments. Windows count from the last query's key."""
    assert right == (unbounded if left == unbounded else 0)
    assert causal or left == unbounded
    window = None if left == unbounded else left + 1
    return ReferenceKernel(Scores(window, softcap or None, softmax_scale))


def call(function, tensors, causal, cu_seqlens, longest):
    """Calls a kernel's function with [B, S, H, E], or with packed [N, H, E] and boundaries."""
    if cu_seqlens is None:
        assert longest is None
        return function(*tensors, causal=causal)
    assert causal
    assert cu_seqlens.dtype == torch.int32
    assert longest == int(cu_seqlens.diff().max())
    documents = make_documents(cu_seqlens.tolist())
    return [t[0] for t in function(*(t[None] for t in tensors), documents=documents)]


# --- flash-attn: FlashAttention-2 ----------------------------------------------------------------


@pytest.fixture
def installed_2(monkeypatch):
    """-1 is no bound; a softcap of 0 is none."""

    def forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    ):  # fmt: skip
        assert (dropout_p, alibi_slopes, return_softmax) == (0.0, None, False)
        kernel = by_formula(softmax_scale, causal, window_size_left, window_size_right, softcap, -1)
        return *call(kernel.forward, (q, k, v), causal, None, None), None, None

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, alibi_slopes, deterministic) == (0.0, None, False)
        assert softmax_lse.is_contiguous()
        kernel = by_formula(softmax_scale, causal, window_size_left, window_size_right, softcap, -1)
        tensors = (dout, q, k, v, out, softmax_lse)
        write((dq, dk, dv), call(kernel.backward, tensors, causal, None, None))

    def varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False,
    ):  # fmt: skip
        assert max_seqlen_q == max_seqlen_k
        kernel = by_formula(softmax_scale, causal, window_size_left, window_size_right, softcap, -1)
        return *call(kernel.forward, (q, k, v), causal, cu_seqlens_q, max_seqlen_q), None, None

    def varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        kernel = by_formula(softmax_scale, causal, window_size_left, window_size_right, softcap, -1)
        tensors = (dout, q, k, v, out, softmax_lse)
        write((dq, dk, dv), call(kernel.backward, tensors, causal, cu_seqlens_q, max_seqlen_q))

    install(
        monkeypatch,
        "flash_attn.flash_attn_interface",
        _flash_attn_forward=forward,
        _flash_attn_backward=backward,
        _flash_attn_varlen_forward=varlen_forward,
        _flash_attn_varlen_backward=varlen_backward,
    )


def write(places, values):
    for place, value in zip(places, values, strict=True):
        place.copy_(value)


# --- flash-attn-3 --------------------------------------------------------------------------------

FORWARD_3 = """fwd(
    Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new{none}, Tensor(v_new!)? v_new{none},
    Tensor? q_v{none}, Tensor(out!)? out{none}, Tensor? cu_seqlens_q{none},
    Tensor? cu_seqlens_k{none}, Tensor? cu_seqlens_k_new{none}, Tensor? seqused_q{none},
    Tensor? seqused_k{none}, int? max_seqlen_q{none}, int? max_seqlen_k{none},
    Tensor? page_table{none}, Tensor? kv_batch_idx{none}, Tensor? leftpad_k{none},
    Tensor? rotary_cos{none}, Tensor? rotary_sin{none}, Tensor? seqlens_rotary{none},
    Tensor? q_descale{none}, Tensor? k_descale{none}, Tensor? v_descale{none},
    {scale}, bool is_causal{false}, int window_size_left=-1, int window_size_right=-1,
    int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False,
    Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0
) -> (Tensor(out!), Tensor, Tensor, Tensor)"""

BACKWARD_3 = """bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
    Tensor(dq!)? dq{none}, Tensor(dk!)? dk{none}, Tensor(dv!)? dv{none},
    Tensor? cu_seqlens_q{none}, Tensor? cu_seqlens_k{none}, Tensor? seqused_q{none},
    Tensor? seqused_k{none}, int? max_seqlen_q{none}, int? max_seqlen_k{none},
    {scale}, bool is_causal{false}, int window_size_left=-1, int window_size_right=-1,
    float softcap=0.0, bool deterministic=False, int sm_margin=0
) -> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"""

SCHEMAS_3 = {
    "flash_api.cpp": {"none": "", "false": "", "scale": "float softmax_scale"},
    "flash_api_stable.cpp": {
        "none": "=None",
        "false": "=False",
        "scale": "float? softmax_scale=None",
    },
}


def forward_3(
    q, k, v, k_new=None, v_new=None, q_v=None, out=None, cu_seqlens_q=None, cu_seqlens_k=None,
    cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None,
    seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    is_causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0,
    is_rotary_interleaved=False, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    assert (num_splits, attention_chunk, sm_margin) == (1, 0, 0)  # as in the package's own wrapper
    assert max_seqlen_q == max_seqlen_k
    chosen = by_formula(softmax_scale, is_causal, window_size_left, window_size_right, softcap, -1)
    results = call(chosen.forward, (q, k, v), is_causal, cu_seqlens_q, max_seqlen_q)
    return *results, q.new_empty(0), q.new_empty(0)


def backward_3(
    dout, q, k, v, out, softmax_lse, dq=None, dk=None, dv=None, cu_seqlens_q=None,
    cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
    deterministic=False, sm_margin=0,
):  # fmt: skip
    assert all(t.stride(-1) == 1 for t in (dout, q, k, v, out, dq, dk, dv))
    assert softmax_lse.is_contiguous()
    assert (deterministic, sm_margin) == (False, 0)
    chosen = by_formula(softmax_scale, is_causal, window_size_left, window_size_right, softcap, -1)
    tensors = (dout, q, k, v, out, softmax_lse)
    gradients = call(chosen.backward, tensors, is_causal, cu_seqlens_q, max_seqlen_q)
    write((dq, dk, dv), gradients)
    return dq, dk, dv, *(q.new_empty(0) for _ in range(5))


@pytest.fixture(params=SCHEMAS_3)
def installed_3(request, monkeypatch, device_is):
    """Operators of torch with the package's schemas, so that torch checks the calls."""
    with torch.library._scoped_library("mst_train_flash_attn_3", "DEF") as library:
        for text, function in ((FORWARD_3, forward_3), (BACKWARD_3, backward_3)):
            library.define(" ".join(text.format(**SCHEMAS_3[request.param]).split()))
            library.impl(text.partition("(")[0], function, "CPU")
        operators = torch.ops.mst_train_flash_attn_3
        monkeypatch.setattr(torch.ops, "flash_attn_3", operators, raising=False)
        install(monkeypatch, "flash_attn_3._C")
        yield
        monkeypatch.undo()
        del torch.ops.mst_train_flash_attn_3


# --- flash-attn-4 --------------------------------------------------------------------------------


def forward_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None,
    causal=False, softcap=None, window_size_left=None, window_size_right=None, learnable_sink=None,
    tile_mn=None, mma_pv_is_rs=None, intra_wg_overlap=None, num_threads=384, num_splits=1,
    pack_gqa=None, _arch=None, score_mod=None, mask_mod=None, block_sparse_tensors=None,
    return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None, q_descale=None,
    k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None,
    seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
):  # fmt: skip
    assert max_seqlen_q == max_seqlen_k
    chosen = by_formula(softmax_scale, causal, window_size_left, window_size_right, softcap, None)
    out, lse = call(chosen.forward, (q, k, v), causal, cu_seqlens_q, max_seqlen_q)
    return out, lse if return_lse else None, None, None, None


def backward_4(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False,
    num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False,
    AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None,
    cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    deterministic=False, dq=None, dk=None, dv=None, score_mod=None, score_mod_bwd=None,
    mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
    learnable_sink=None,
):  # fmt: skip
    assert deterministic is False
    assert lse.shape == (q.transpose(-2, -3).shape[:-1])
    assert softcap is not None  # None would be taken for a cap
    chosen = by_formula(softmax_scale, causal, window_size_left, window_size_right, softcap, None)
    tensors = (dout, q, k, v, out, lse)
    return tuple(call(chosen.backward, tensors, causal, cu_seqlens_q, max_seqlen_q))


@pytest.fixture
def installed_4(monkeypatch, device_is):
    functions = {"_flash_attn_fwd": forward_4, "_flash_attn_bwd": backward_4}
    install(monkeypatch, "flash_attn.cute.interface", **functions)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.0.0b36")


# --- all of them ---------------------------------------------------------------------------------

CASES = list(product([(4, 2), (3, 3), (6, 1)], [*SCORES, Scores()], DOCUMENTS))


def assert_is_the_formula(kernel, heads, cu_seqlens):
    """Whole, and in chunks of rows, where queries also see all of some keys before them."""
    inputs = make_inputs(*heads, size=8)
    expected, documents = whole(inputs, kernel.scores, cu_seqlens), make_documents(cu_seqlens)
    q, k, v, dout = inputs
    out, lse = kernel.forward(q, k, v, documents)
    assert_same((out, lse, *kernel.backward(dout, q, k, v, out, lse, documents)), expected)
    assert_same(in_chunks(kernel, inputs, documents, 4), expected)


@pytest.mark.parametrize(("heads", "scores", "cu_seqlens"), CASES)
def test_flash_attn_is_handed_what_it_expects(installed_2, heads, scores, cu_seqlens):
    assert_is_the_formula(FlashAttnKernel(scores), heads, cu_seqlens)


@pytest.mark.parametrize(("heads", "scores", "cu_seqlens"), CASES)
def test_flash_attn_3_is_handed_what_it_expects(installed_3, heads, scores, cu_seqlens):
    assert_is_the_formula(FlashAttn3Kernel(scores), heads, cu_seqlens)


@pytest.mark.parametrize(("heads", "scores", "cu_seqlens"), CASES)
def test_flash_attn_4_is_handed_what_it_expects(installed_4, heads, scores, cu_seqlens):
    assert_is_the_formula(FlashAttn4Kernel(scores), heads, cu_seqlens)


@pytest.mark.parametrize("kernel", [FlashAttn3Kernel, FlashAttn4Kernel])
def test_gradients_of_a_sum_have_no_dense_dimension(kernel, installed_3, installed_4):
    """``sum()``'s gradient is one number, expanded: every stride is 0."""
    q, k, v, _ = make_inputs(size=8)
    one = torch.ones((), dtype=q.dtype).expand_as(q)
    out, lse = kernel().forward(q, k, v)
    assert_same(
        kernel().backward(one, q, k, v, out, lse),
        kernel().backward(one.contiguous(), q, k, v, out, lse),
    )


# --- refusals ------------------------------------------------------------------------------------


def assert_refused(name, message, dtype=torch.bfloat16, scores=None):
    with pytest.raises(UserError, match=rf"kernel\.attention={name} cannot be used: .*{message}"):
        select_attention(name, CUDA, dtype, scores or Scores())


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_3", "flash_attn_4"])
def test_without_its_package(monkeypatch, name):
    for module in [m for m in sys.modules if m.partition(".")[0] in ("flash_attn", "flash_attn_3")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    package = name.replace("_", "-")
    assert_refused(name, f"the package {package} is not installed.*pip install")


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_3", "flash_attn_4"])
def test_a_package_built_for_something_else(
    monkeypatch, installed_2, installed_3, installed_4, name
):
    def fail(module):
        raise AttributeError("ThrMma")

    flash.import_problem.cache_clear()
    monkeypatch.setattr("importlib.import_module", fail)
    assert_refused(name, r"cannot be imported \(AttributeError: ThrMma\)")


@pytest.mark.parametrize("name", ["flash_attn_3", "flash_attn_4"])
def test_in_fp32(installed_3, installed_4, name):
    assert_refused(name, "set precision=bf16", torch.float32)


def test_a_flash_attn_3_without_operators(monkeypatch, device_is):
    install(monkeypatch, "flash_attn_3._C")
    monkeypatch.setattr(torch.ops, "flash_attn_3", torch.ops.mst_train_nothing, raising=False)
    assert_refused("flash_attn_3", "registers no operators with torch")


@pytest.mark.parametrize("version", ["0.0.1", "4.0.0b9", "4.0.0b35"])
def test_an_old_flash_attn_4(monkeypatch, installed_4, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert_refused("flash_attn_4", f"flash-attn-4 {version} is too old: pip install")


@pytest.mark.parametrize("version", ["4.0.0b36", "4.0.0b40", "4.0.0", "4.1.0"])
def test_a_new_flash_attn_4(monkeypatch, installed_4, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    kernel = select_attention("flash_attn_4", CUDA, torch.bfloat16, Scores(softcap=2.0)).kernel
    assert isinstance(kernel, FlashAttn4Kernel)


@pytest.mark.parametrize(
    ("name", "capability", "message"),
    [
        ("flash_attn_3", AMPERE, r"Hopper \(compute capability 9\.0\), and this device has 8\.0"),
        ("flash_attn_3", BLACKWELL, "this device has 10"),
        ("flash_attn_4", AMPERE, "this device has 8"),
        ("flash_attn_4", (13, 0), "this device has 13"),
    ],
)
def test_other_devices(installed_3, installed_4, device_is, name, capability, message):
    device_is(capability)
    assert_refused(name, message)


def test_what_flash_attn_4_lacks_on_small_blackwells(installed_4, device_is):
    device_is(CONSUMER)
    assert_refused("flash_attn_4", "no capped scores", scores=Scores(softcap=2.0))
    select_attention("flash_attn_4", CUDA, torch.bfloat16, Scores(window=2))


@pytest.mark.parametrize(
    ("kernel", "capability", "accepted", "refused"),
    [
        (FlashAttn3Kernel, HOPPER, (8, 64, 200, 256), (4, 60, 264)),
        (FlashAttn4Kernel, HOPPER, (8, 64, 200, 256), (4, 60, 264)),
        (FlashAttn4Kernel, BLACKWELL, (8, 64, 128, 256), (60, 136, 192, 512)),
        (FlashAttn4Kernel, (11, 0), (128, 256), (192,)),
        (FlashAttn4Kernel, CONSUMER, (64, 128, 192), (60, 200, 256)),
    ],
)
def test_head_sizes(installed_3, installed_4, device_is, kernel, capability, accepted, refused):
    device_is(capability)
    for size in accepted:
        q, k, v, _ = make_inputs(2, 1, 3, size)
        kernel().forward(q, k, v)
    for size in refused:
        q, k, v, _ = make_inputs(2, 1, 3, size)
        with pytest.raises(UserError, match=rf"heads of up to \d+.* the model's are of {size}:"):
            kernel().forward(q, k, v)
