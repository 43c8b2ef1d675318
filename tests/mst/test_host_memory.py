"""Page-locked host memory: as much as is counted, and nothing left behind."""

import gc
import logging
import mmap
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from late_gpu import CUDA, LateGpu

from mst_train.mst import HostBudgetError, Offload
from mst_train.mst.host_memory import HostMemory

PAGE = mmap.PAGESIZE
LATE, SOON = [((0, 1, 2, 3), 1)], [((3, 2, 1, 0), 1)]
"""The host goes first; the host goes last."""


def empty(memory, *shape, dtype=torch.float32):
    return memory.empty(torch.Size(shape), dtype)


@pytest.mark.parametrize(
    ("shape", "dtype", "pages"),
    [
        ((1,), torch.bfloat16, 1),
        ((PAGE,), torch.uint8, 1),
        ((PAGE + 1,), torch.uint8, 2),
        ((5, 123, 7), torch.float64, -(-5 * 123 * 7 * 8 // PAGE)),
        ((2, 0, 3), torch.float32, 0),
        ((), torch.float32, 1),
    ],
)
def test_it_is_of_whole_pages(shape, dtype, pages):
    memory = HostMemory(pinned=True)
    with LateGpu(SOON) as gpu:
        tensor = empty(memory, *shape, dtype=dtype)
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert memory.bytes_for(tensor.shape, dtype) == pages * PAGE
        assert gpu.cudart.locked_bytes == pages * PAGE
        assert bool(gpu.cudart.find(tensor.data_ptr())) == bool(pages)
        tensor.fill_(1)
        del tensor


def test_it_is_locked_as_long_as_any_tensor_shares_it():
    memory = HostMemory(pinned=True)
    with LateGpu(SOON) as gpu:
        tensor = empty(memory, 5).fill_(3)
        view = tensor.view(5, 1)[2:]
        del tensor
        assert len(gpu.cudart.locked) == 1
        assert view.tolist() == [[3.0]] * 3
        del view
        assert not gpu.cudart.locked


def test_ordinary_memory_is_what_it_was():
    memory = HostMemory(pinned=False)
    with LateGpu(SOON) as gpu:
        assert empty(memory, 3, 5).nbytes == memory.bytes_for(torch.Size((3, 5)), torch.float32)
        assert not gpu.cudart.locked
    assert empty(memory, 3).device.type == "cpu"
    assert memory.empty(torch.Size((3,)), torch.float32, "meta").is_meta


@pytest.mark.parametrize("whose", ["CUDA's", "the system's"])
def test_what_cannot_be_locked_is_ordinary_memory(whose, caplog):
    full = mock.patch.object(mmap, "mmap", side_effect=OSError(12, "Cannot allocate memory"))
    memory = HostMemory(pinned=True)
    with LateGpu(SOON, problem=2 if whose == "CUDA's" else 0) as gpu:
        with full if whose == "the system's" else mock.MagicMock():
            tensors = [empty(memory, 3).fill_(n) for n in range(3)]
        assert not gpu.cudart.locked
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        reason = "error 2 of CUDA's" if whose == "CUDA's" else "Cannot allocate memory"
        assert f"cannot be pinned ({reason}" in warning.replace("[Errno 12] ", "")
        # And the next kernel is not blamed for it.
        assert (gpu.tensor(tensors[2]) + 1).cpu().tolist() == [3.0] * 3


def test_a_forked_process_shares_it():
    """Where CUDA copies to by physical address, this process's pages stay."""
    memory = HostMemory(pinned=True)
    with LateGpu(SOON):
        tensor = empty(memory, 4).fill_(1)
        child = os.fork()
        if child == 0:
            tensor[1] = 7
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert tensor.tolist() == [1.0, 7.0, 1.0, 1.0]
        del tensor


@pytest.mark.slow
def test_the_end_of_the_process_needs_no_help():
    """CUDA may be gone when the last tensors go."""
    program = """
import torch
from late_gpu import LateGpu
from mst_train.mst.host_memory import HostMemory

gpu = LateGpu([((0, 1, 2, 3), 1)]).__enter__()
gpu.cudart.cudaHostUnregister = lambda address: print("too late")
tensor = HostMemory(pinned=True).empty(torch.Size((5,)), torch.float32)
assert gpu.cudart.locked
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- within a budget ---------------------------------------------------------------------------


def test_the_budget_is_of_what_is_locked():
    with LateGpu(LATE) as gpu:
        offload = Offload(CUDA, budget_bytes=3 * PAGE - 1)
        stored = [offload.store([gpu.tensor(torch.ones(n))]) for n in (2, 3)]
        with pytest.raises(HostBudgetError):
            offload.store([gpu.tensor(torch.ones(4))])
        assert offload.host_bytes == gpu.cudart.peak_bytes == 2 * PAGE
        del stored, offload


def sums_of_steps(gpu):
    """Steps of other lengths, within a budget that holds the buffers of one."""
    offload, sums = Offload(CUDA, budget_bytes=2 * PAGE), []
    for length in (2, 3, PAGE // 4, 5):
        stored = offload.store([gpu.tensor(torch.ones(length)) for _ in range(2)])
        sums.append(sum(tensor.sum() for tensor in stored.load()))
        del stored
    return [total.cpu() for total in sums]


@pytest.mark.parametrize("schedule", [LATE, SOON])
def test_memory_is_given_up_when_nothing_is_copied_any_more(schedule):
    with LateGpu(schedule) as gpu:
        assert sums_of_steps(gpu) == [4, 6, PAGE / 2, 10]
        assert gpu.cudart.peak_bytes == 2 * PAGE
        assert not gpu.cudart.locked


def test_memory_given_up_too_soon_is_found():
    found = pytest.raises(AssertionError, match="host memory that is gone")
    with found, LateGpu(LATE) as gpu, mock.patch.object(torch.cuda, "synchronize"):
        sums_of_steps(gpu)


def test_a_store_that_passes_the_budget_gives_back_what_it_had_taken():
    offload = Offload(torch.device("cpu"), budget_bytes=24)
    with pytest.raises(HostBudgetError):
        offload.store([torch.ones(3), torch.ones(4)])
    gc.collect()
    stored = offload.store([torch.ones(3), torch.ones(3)])
    assert offload.host_bytes == 24
    assert [tensor.tolist() for tensor in stored.load()] == [[1.0] * 3] * 2
