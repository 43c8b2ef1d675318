"""The sum of a weight's gradient: what it rounds, and what it holds beside itself."""

import logging

import pytest
import torch

from mst_train.memory.counter import StepCounter
from mst_train.mst import accumulate
from mst_train.mst.accumulate import WeightGradient, simulated_device

ROWS, INPUT, OUTPUT, CHUNKS = 64, 32, 48, 5
HALF = [torch.bfloat16, torch.float16]


def make_chunks(dtype, device="cpu"):
    torch.manual_seed(0)
    chunks = [(torch.randn(ROWS, OUTPUT), torch.randn(ROWS, INPUT)) for _ in range(CHUNKS)]
    return [(dy.to(device, dtype), x.to(device, dtype)) for dy, x in chunks]


def total_of(chunks):
    """The sum before it is rounded to the weight's type."""
    _, x = chunks[0]
    gradient = WeightGradient(x.new_zeros(OUTPUT, INPUT), several=True)
    for dy, x in chunks:
        gradient.add_product(dy, x)
    return gradient._total


def error_of(chunks):
    """Relative, against float64."""
    truth = sum(dy.double().t() @ x.double() for dy, x in chunks)
    total = total_of(chunks)
    assert total.dtype == torch.float32
    return ((total.double() - truth).norm() / truth.norm()).item()


@pytest.fixture
def products_in_fp32(monkeypatch):
    """Torch's products of halves in fp32, which it has on CUDA alone, on a CPU."""
    mm, addmm = torch.mm, torch.addmm

    def in_fp32(a, b, out_dtype):
        assert out_dtype == torch.float32
        return mm(a.float(), b.float())

    def added(total, a, b, *, out_dtype, out):
        assert out_dtype == out.dtype == total.dtype == torch.float32
        assert out is total
        return addmm(total, a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "mm", in_fp32)
    monkeypatch.setattr(torch, "addmm", added)
    monkeypatch.setattr(accumulate, "_adds_products_in_fp32", lambda like: True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_products_are_not_rounded_where_they_can_be_had_in_fp32(products_in_fp32, dtype):
    assert error_of(make_chunks(dtype)) < 1e-6


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_products_are_rounded_once_elsewhere(dtype):
    unit = torch.finfo(dtype).eps / 2
    assert unit / 20 < error_of(make_chunks(dtype)) < unit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_products_are_had_in_fp32_on_cuda(dtype):
    assert accumulate._products_in_fp32_work(torch.device("cuda"), dtype)
    assert error_of(make_chunks(dtype, "cuda")) < 1e-6


def test_a_torch_without_them_is_told_of(caplog):
    """As torch on a CPU is one."""
    accumulate._products_in_fp32_work.cache_clear()
    with caplog.at_level(logging.WARNING, logger="mst_train"):
        assert not accumulate._products_in_fp32_work(torch.device("cpu"), torch.bfloat16)
    accumulate._products_in_fp32_work.cache_clear()
    assert "adds no products of torch.bfloat16 to fp32 sums (" in caplog.text
    assert "\n" not in caplog.records[0].getMessage()


@pytest.mark.parametrize(("kind", "arrays_of_halves"), [("cuda", 0), ("cpu", 1)])
def test_what_a_simulated_sum_holds_beside_itself(kind, arrays_of_halves):
    chunks = make_chunks(torch.bfloat16, "meta")
    counter = StepCounter(1, {})
    with simulated_device(kind), counter:
        total = total_of(chunks)
        assert counter.live_bytes == 4 * total.numel()
        weight_and_products = (1 + arrays_of_halves) * 2 * total.numel()
        assert counter.peak_bytes == counter.live_bytes + weight_and_products
        assert counter.work["product_flops"] == CHUNKS * 2 * ROWS * INPUT * OUTPUT
