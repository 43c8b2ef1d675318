"""The simulated step against the real one, measured by the tracker: equal to the byte."""

import mmap

import pytest
import torch
from steps import describe, marked, measured, predicted, random_step, with_experts

from mst_train.cli.compose import compose
from mst_train.memory.counter import StepCounter
from mst_train.memory.devices import find_device
from mst_train.memory.fakes import SimulatedKernel
from mst_train.memory.simulate import simulate
from mst_train.units import GIB

SEEDS = [seed for seed in range(48) if random_step(seed).config.optimizer.offload == "none"]
"""Without DeepSpeed, which may have to compile first; ``steps.py`` runs those with it too."""

DOCUMENTS = [
    ["model.sliding_window=24"],
    ["model.sliding_window=24", "kernel.attention=tiled", "train.micro_batch_size=2"],
    ["kernel.attention=sdpa"],
    ["memory.policy=vanilla"],
]


@pytest.mark.parametrize("seed", marked(SEEDS, quick=12, slow=24))
def test_predicted_is_measured(seed):
    step = random_step(seed)
    assert predicted(step) == measured(step), describe(step)


@pytest.mark.parametrize("seed", marked(SEEDS, quick=4, slow=16))
def test_predicted_is_measured_with_experts(seed):
    """However many tokens go to which: in mini-sequences nothing depends on it."""
    step = with_experts(seed, random_step(seed))
    assert predicted(step) == measured(step), describe(step)


def test_torchs_own_attention_holds_no_scores():
    config = compose(["kernel.attention=sdpa", "data.sequence_length=32768"])
    assert simulate(config, find_device("cpu")).allocated_bytes < GIB


def test_a_gpu_has_a_stand_in_for_fused_kernels_alone():
    """The formula holds its scores there too."""
    arguments = ["model=llama_tiny", "memory.policy=vanilla", "precision=bf16"]
    arguments += ["data.sequence_length=2048", "model.num_layers=1"]

    def peak(name):
        config = compose([*arguments, f"kernel.attention={name}"])
        return simulate(config, find_device("a100_80gb")).allocated_bytes

    assert peak("reference") > peak("flash_attn")


def test_a_gpus_host_memory_is_of_whole_pages():
    arguments = ["model=llama_tiny", "data.sequence_length=250", "memory.offload=host"]
    config = compose([*arguments, "precision=bf16"])
    found, counted = (simulate(config, find_device(name)) for name in ("a100_80gb", "cpu"))
    buffers = 3 * config.model.num_layers  # x, attention's result and log-sum-exp
    assert found.host_bytes % mmap.PAGESIZE == 0
    assert 0 < found.host_bytes - counted.host_bytes < buffers * mmap.PAGESIZE


@pytest.mark.parametrize("settings", DOCUMENTS, ids=" ".join)
def test_one_document_in_each_row_takes_the_most(settings):
    arguments = ["model=llama_tiny", "data.sequence_length=192", "data.attention=documents"]
    arguments += ["memory.block_chunk_tokens=96", "model.num_layers=1", *settings]
    config, cpu = compose(arguments), find_device("cpu")
    whole = simulate(config, cpu)
    end = 192 * config.train.micro_batch_size
    rows = list(range(0, end, 192))
    for more in ([], [1, 97], [40, 90, 100, 191], list(range(5, 192, 5))):
        cu_seqlens = sorted({*rows, end, *(row + place for row in rows for place in more)})
        found = simulate(config, cpu, cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32))
        assert found.allocated_bytes <= whole.allocated_bytes
        assert found.host_bytes <= whole.host_bytes


@pytest.mark.parametrize(
    ("name", "bytes_per_key"),
    [  # of 8 heads of 16 that share 2, beside the gradients themselves
        ("cudnn", 2 * 8 * 16 * 2),
        ("torch_flash", 2 * 8 * 16 * 2),
        ("auto", 2 * 8 * 16 * 2),
        ("flash_attn_3", 2 * 2 * 16 * 4),
    ],
)
def test_what_attention_on_a_gpu_takes_for_its_backward(name, bytes_per_key):
    queries, keys, heads, size = 64, 256, 8, 16
    q = torch.empty(1, queries, heads, size, dtype=torch.bfloat16, device="meta")
    k = q.new_empty(1, keys, 2, size)
    counter = StepCounter(1, {})
    with counter:
        kernel = SimulatedKernel(counter, name)
        out, lse = kernel.forward(q, k, k, causal=False)
        counter.reset_peak()
        before = counter.live_bytes
        gradients = kernel.backward(out, q, k, k, out, lse, causal=False)
        of_queries = 4 * queries * heads * size + 4 * queries * heads
        taken = sum(t.nbytes for t in gradients) + of_queries + bytes_per_key * keys
        assert counter.peak_bytes == before + taken
    whole = SimulatedKernel(counter, name)
    with counter:
        counter.reset_peak()
        before = counter.live_bytes
        gradients = whole.backward(out, q, q, q, out, lse)  # nothing is shared
        assert counter.peak_bytes == before + sum(t.nbytes for t in gradients) + of_queries
