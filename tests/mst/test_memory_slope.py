"""Peak memory as a function of length: a straight line whose slope the dimensions give.

Measured on fake tensors, which run the same code at Llama3-8B's dimensions without its memory; one
setting is measured on real tensors too, to show that they count alike.
"""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_train.attention import select_attention
from mst_train.attention.select import CpuKernel
from mst_train.config import ModelConfig
from mst_train.memory.tracker import MemoryTracker
from mst_train.model import Policy, build_model
from mst_train.mst import Offload

CPU = torch.device("cpu")
KIB = 1024
LAYERS = 2
LLAMA3 = ModelConfig(
    vocab_size=4096,  # a small head, so that the blocks decide the peak at every length
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=LAYERS,
    num_heads=32,
    num_kv_heads=8,
)
POLICY = Policy(True, True, 4096, 4096, block_chunk_tokens=4096)

# Bytes per token in bf16: a hidden state (or queries, or attention's result), keys with values, a
# number per head.
HIDDEN, KEYS_VALUES, LSE = 8 * KIB, 4 * KIB, 32 * 4
KEPT = {True: 2 * HIDDEN + LSE, False: HIDDEN}  # with attention's result and without

# What exists for all tokens while a block goes backward, beside what blocks have kept: keys and
# values, their gradients in fp32, the gradients of the block's result and input, and the model's
# cosines and sines. Everything else is of one chunk.
BACKWARD = KEYS_VALUES + 2 * KEYS_VALUES + 2 * HIDDEN + 2 * 64 * 4


def kept(attention):
    return {"attention": "all" if attention else 0}


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


def slopes(policy, lengths, layers=LAYERS, **options):
    """Bytes per token between one length (in units of 8K tokens) and the next."""
    config, lengths = dataclasses.replace(LLAMA3, num_layers=layers), [k * 8192 for k in lengths]
    with FakeTensorMode():
        peaks = [peak(config, policy, tokens, **options)[0] for tokens in lengths]
    return [
        (b - a) / (n - m) for (a, b), (m, n) in zip(pairwise(peaks), pairwise(lengths), strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "lengths"), [(True, (1, 2, 4)), (False, (1, 2))])
def test_slope_on_the_device(keep, lengths):
    """All blocks' kept tensors, in the backward of the last one."""
    for slope in slopes(dataclasses.replace(POLICY, keep=kept(keep)), lengths):
        assert slope == pytest.approx(LAYERS * KEPT[keep] + BACKWARD, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "layers"), [(True, 2), (True, 3), (False, 2)])
def test_slope_with_offload_does_not_depend_on_depth(monkeypatch, keep, layers):
    """Of what was kept, and of the gradients between blocks, a chunk or two are there at a time;
    but when a block comes to its first chunk, all keys and values of the block before are on their
    way back. As much is there in the head: its input, and the gradient of that."""
    monkeypatch.setattr(CpuKernel, "keys_at_once", 4096)
    policy = dataclasses.replace(POLICY, keep=kept(keep))
    [slope] = slopes(policy, (4, 6), layers, offload=True)
    assert slope == pytest.approx(BACKWARD - 2 * HIDDEN + KEYS_VALUES, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [True, False])
def test_host_memory_is_what_the_blocks_keep_with_keys_and_values(keep):
    """Keys and values wait there too, rather than being computed a third time; and with several
    chunks the last block's result, and its gradient."""
    policy = dataclasses.replace(POLICY, keep=kept(keep))
    with FakeTensorMode():
        _, several = peak(LLAMA3, policy, 8192, offload=True)
        _, one_chunk = peak(LLAMA3, policy, 4096, offload=True)
    assert several == 8192 * (LAYERS * (KEPT[keep] + KEYS_VALUES) + 2 * HIDDEN)
    assert one_chunk == 4096 * LAYERS * KEPT[keep]


@pytest.mark.slow
def test_real_tensors_count_alike():
    config = ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=224,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
    )
    mini_sequence = Policy(True, True, 128, 128, block_chunk_tokens=256)
    for policy in (mini_sequence, Policy(True), Policy()):
        real, _ = peak(config, policy, 1024, dtype=torch.float32)
        with FakeTensorMode():
            fake, _ = peak(config, policy, 1024, dtype=torch.float32)
        assert fake == pytest.approx(real, rel=0.01), policy
