"""Fixtures of the kernel tests: on a CUDA machine they run on the GPU, elsewhere interpreted."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

import mst_kernels


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=("torch", "triton"))
def implementation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Runs the test once with the torch implementation and once with the Triton kernels."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") == "1":
            _round_to_nearest_bfloat16(monkeypatch)
    with mst_kernels.backend(request.param):
        yield request.param


def _round_to_nearest_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the interpreter round fp32 to bf16 as GPUs do; by itself it truncates."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, from_dtype, to_dtype, mode):
        if from_dtype != tl.float32 or to_dtype != tl.bfloat16:
            return convert(values, from_dtype, to_dtype, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20250)
