"""Peak memory as a function of length: a straight line whose slope the dimensions give.

Measured on fake tensors, which run the same code at Llama3-8B's dimensions without its memory; one
setting is measured on real tensors too, to show that they count alike.
"""

from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_train.config import ModelConfig
from mst_train.memory.tracker import MemoryTracker
from mst_train.model import build_model, select_attention
from mst_train.mst import Offload, Policy

CPU = torch.device("cpu")
KIB = 1024
LAYERS = 4
LLAMA3 = ModelConfig(
    vocab_size=4096,  # a small head, so that the blocks decide the peak at every length
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=LAYERS,
    num_heads=32,
    num_kv_heads=8,
)

# Bytes per token in bf16: a hidden state, queries with keys and values, a number per head, the
# cosines and sines.
HIDDEN, QKV, LSE, TABLES = 8 * KIB, 12 * KIB, 32 * 4, 2 * 64 * 4
KEPT = {"keep": 2 * HIDDEN + LSE, "recompute attention": HIDDEN}


def peak(config, policy, tokens, *, dtype=torch.bfloat16, offload=False):
    """Peak of forward and backward beyond the weights and their gradients; host bytes."""
    attention = select_attention("auto", CPU, dtype)
    model = build_model(config, policy=policy, attention=attention, dtype=dtype)
    model.offload = Offload(CPU) if offload else None
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    batch = torch.zeros(1, tokens, dtype=torch.int64)
    if offload:
        model(batch, batch)[0].backward()  # makes the host buffers
    with MemoryTracker() as tracker:
        model(batch, batch)[0].backward()
    return tracker.peak_bytes, model.offload.host_bytes if offload else 0


def slopes(policy, **options):
    lengths = [k * 65536 for k in (1, 2, 4)]
    with FakeTensorMode():
        peaks = [peak(LLAMA3, policy, tokens, **options)[0] for tokens in lengths]
    return [
        (b - a) / (n - m) for (a, b), (m, n) in zip(pairwise(peaks), pairwise(lengths), strict=True)
    ]


@pytest.mark.parametrize("keep", [True, False])
def test_slope_on_the_device(keep):
    """All blocks' kept tensors, and what the backward of one MLP has beside them: queries, keys and
    values, both norms' results, the residual stream in between, the gradients of the MLP's result
    and input, and attention's result where it is not kept."""
    first, second = slopes(Policy(True, True, 16384, 16384, keep_attention=keep))
    kept = KEPT["keep" if keep else "recompute attention"]
    expected = LAYERS * kept + QKV + 5 * HIDDEN + TABLES + (0 if keep else HIDDEN + LSE)
    assert first == pytest.approx(second, rel=0.01)
    assert second == pytest.approx(expected, rel=0.1)


def test_slope_with_offload_does_not_depend_on_depth():
    """The same without the other blocks' kept tensors, but for one that is on its way."""
    _, slope = slopes(Policy(True, True, 16384, 16384), offload=True)
    expected = 2 * KEPT["keep"] + QKV + 5 * HIDDEN + TABLES
    assert slope == pytest.approx(expected, rel=0.1)


def test_host_memory_is_what_the_blocks_keep():
    with FakeTensorMode():
        _, host = peak(LLAMA3, Policy(True, True, 16384, 16384), 65536, offload=True)
    assert host == 65536 * LAYERS * KEPT["keep"]


def test_real_tensors_count_alike():
    config = ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=224,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
    )
    for policy in (Policy(True, True, 128, 128), Policy(True), Policy()):
        real, _ = peak(config, policy, 1024, dtype=torch.float32)
        with FakeTensorMode():
            fake, _ = peak(config, policy, 1024, dtype=torch.float32)
        assert fake == pytest.approx(real, rel=0.01), policy
