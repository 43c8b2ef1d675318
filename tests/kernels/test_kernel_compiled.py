"""What the Triton kernels take of the GPUs that they are compiled for, without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

REGISTERS = 65536
"""Of a multiprocessor. Two programs at least are to be there at once."""

SHARED = 48 * 1024
"""Bytes per program: what any GPU gives without being asked."""


@pytest.fixture(scope="module", params=[80, 90, 100], ids="sm_{}".format)
def compiled(request):
    program = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, program, str(request.param)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.slow
def test_kernels_compile_without_spills_and_leave_room_for_others(compiled):
    assert len(compiled) == 20  # forward and backward of ten shapes
    for name, takes in compiled.items():
        assert takes["stack"] == 0, f"{name} spills registers: {takes}"
        assert takes["shared"] <= SHARED, f"{name}: {takes}"
        assert takes["registers"] * 32 * takes["warps"] <= REGISTERS // 2, f"{name}: {takes}"


@pytest.mark.slow
def test_a_program_is_large_enough_to_keep_memory_busy(compiled):
    """Short rows too: one warp with one head at a time would wait for each."""
    assert all(takes["warps"] >= 4 for takes in compiled.values())
