"""Which implementation runs, and what is said where the one asked for cannot."""

import importlib
import logging
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mst_kernels

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # makes `import triton` fail
import mst_kernels, torch
print(mst_kernels.glu_forward(torch.ones(2, 3), torch.ones(2, 3)).shape)
try:
    mst_kernels.set_backend("triton")
except ValueError as error:
    print("refused:", error)
"""

TRITON_STAYS_UNLOADED = """
import sys
import mst_kernels, torch
mst_kernels.glu_forward(torch.ones(2, 3), torch.ones(2, 3))
print("loaded" if "triton" in sys.modules else "not loaded")
"""


def test_auto_takes_torch_on_a_cpu_and_says_so_once(monkeypatch, caplog) -> None:
    # Not `mst_kernels.backend`, which is the context manager of that name.
    backend_module = importlib.import_module("mst_kernels.backend")
    monkeypatch.setattr(backend_module, "_auto_logged", False)
    with caplog.at_level(logging.INFO, logger="mst_kernels"), mst_kernels.backend("auto"):
        assert not mst_kernels.use_triton(torch.ones(1))
        assert not mst_kernels.use_triton(torch.ones(1))
    assert [record.getMessage() for record in caplog.records] == [
        "kernel backend auto: torch for cpu tensors of torch.float32"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_takes_triton_on_a_gpu_but_not_for_float64() -> None:
    with mst_kernels.backend("auto"):
        assert mst_kernels.use_triton(torch.ones(1, device="cuda"))
        assert not mst_kernels.use_triton(torch.ones(1, device="cuda", dtype=torch.float64))


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'cuda'.*auto, triton, torch"):
        mst_kernels.set_backend("cuda")
    assert mst_kernels.get_backend() == "auto"


def test_triton_refuses_float64() -> None:
    pytest.importorskip("triton")
    ones = torch.ones(2, 3, dtype=torch.float64)
    with mst_kernels.backend("triton"), pytest.raises(ValueError, match="float64"):
        mst_kernels.glu_forward(ones, ones)


def test_triton_refuses_cpu_tensors_without_the_interpreter(monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ones = torch.ones(2, 3)
    with mst_kernels.backend("triton"), pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        mst_kernels.glu_forward(ones, ones)


def test_context_manager_restores_after_an_error() -> None:
    with pytest.raises(KeyError), mst_kernels.backend("torch"):
        assert mst_kernels.get_backend() == "torch"
        raise KeyError
    assert mst_kernels.get_backend() == "auto"


def _output_of(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=6000
    ).stdout


def test_package_works_without_triton() -> None:
    output = _output_of(WITHOUT_TRITON)
    assert "torch.Size([2, 3])" in output
    assert "refused: kernel backend 'triton' was asked for, but triton cannot be imported" in output


def test_triton_is_imported_only_for_a_kernel() -> None:
    assert _output_of(TRITON_STAYS_UNLOADED) == "not loaded\n"


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_fake_tensors_cost_one_block_however_large(name) -> None:
    """A simulated step runs every operation, on shapes whose data would fill terabytes."""
    if name == "triton":
        pytest.importorskip("triton")
    rows = 10_000_000
    with FakeTensorMode(), mst_kernels.backend(name):
        logits = torch.empty(rows, 128_256, dtype=torch.bfloat16)
        losses, _ = mst_kernels.cross_entropy_(logits, torch.empty(rows, dtype=torch.int64))
        assert losses.shape == (rows,) and losses.dtype == torch.float32
        gate, up, dproduct = (torch.empty(rows, 14_336) for _ in range(3))
        assert mst_kernels.glu_forward(gate, up, out=gate) is gate
        mst_kernels.glu_backward_(dproduct, gate, up)
        x = torch.empty(rows, 4096, requires_grad=True)
        weight = torch.empty(4096, requires_grad=True)
        y, total = mst_kernels.add_rms_norm(x, x.detach(), weight, 1e-5)
        (y.sum() + total.sum()).backward()
        assert x.grad is not None and x.grad.shape == x.shape
        q = torch.empty(1, rows, 32, 128)
        mst_kernels.apply_rope_(q, torch.empty(rows, 64), torch.empty(rows, 64))
