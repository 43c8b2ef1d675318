"""Every backend that this GPU and its packages allow, against the formula."""

import pytest
import torch
from formula import in_chunks, make_documents, make_inputs

from mst_train.attention import select_attention
from mst_train.attention.select import FOR_CUDA, ReferenceKernel
from mst_train.errors import UserError
from mst_train.mst import Scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SEQUENCE, SIZE = 384, 64
SCORES = [
    Scores(),
    Scores(scale=0.3),
    Scores(window=100),
    Scores(softcap=3.0),
    Scores(window=100, softcap=3.0),
]
DOCUMENTS = [None, [0, 100, 101, 384, 500, 768]]


def kernel_or_skip(name, scores):
    try:
        return select_attention(name, torch.device("cuda"), torch.bfloat16, scores).kernel
    except UserError as error:
        pytest.skip(str(error))


def assert_near(actual, truths):
    """Relative errors of whole tensors. bf16 rounds by 0.002; gradients are sums of such terms."""
    names = ("result", "lse", "dq", "dk", "dv", "dsinks")
    bounds = (0.01, 0.002, 0.02, 0.02, 0.02, 0.02)
    assert len(actual) == len(truths)
    for name, result, truth, bound in zip(names, actual, truths, bounds, strict=False):
        error = ((result.double() - truth.double()).norm() / truth.double().norm()).item()
        assert error < bound, f"{name} is off by {error:.2%}"


def results(kernel, inputs, documents):
    q, k, v, dout = inputs
    out, lse = kernel.forward(q, k, v, documents)
    return out, lse, *kernel.backward(dout, q, k, v, out, lse, documents)


@pytest.mark.parametrize("cu_seqlens", DOCUMENTS, ids=["rows", "documents"])
@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("name", ["auto", *FOR_CUDA, "tiled"])
def test_backends_are_the_formula(name, heads, scores, cu_seqlens):
    kernel, documents = kernel_or_skip(name, scores), make_documents(cu_seqlens)
    inputs = [t.to("cuda", torch.bfloat16) for t in make_inputs(*heads, SEQUENCE, SIZE, batch=2)]
    truths = results(ReferenceKernel(scores), [t.float() for t in inputs], documents)
    assert_near(results(kernel, inputs, documents), truths)
    assert_near(in_chunks(kernel, inputs, documents, 128), truths)


@pytest.mark.parametrize("cu_seqlens", DOCUMENTS, ids=["rows", "documents"])
@pytest.mark.parametrize("scores", [Scores(sinks=True), Scores(window=100, sinks=True)], ids=str)
@pytest.mark.parametrize("name", ["auto", *FOR_CUDA, "tiled"])
def test_sinks(name, scores, cu_seqlens):
    kernel, documents = kernel_or_skip(name, scores), make_documents(cu_seqlens)
    inputs = [t.to("cuda", torch.bfloat16) for t in make_inputs(8, 2, SEQUENCE, SIZE, batch=2)]
    sinks = torch.linspace(-1, 4, 8, device="cuda", dtype=torch.bfloat16)
    floats = [t.float() for t in inputs]
    truths = in_chunks(ReferenceKernel(scores), floats, documents, SEQUENCE, sinks.float())
    for rows_at_once in (128, SEQUENCE):
        assert_near(in_chunks(kernel, inputs, documents, rows_at_once, sinks), truths)
