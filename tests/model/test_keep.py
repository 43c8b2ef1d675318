"""What blocks keep beside their input changes memory and time, and no result."""

import random
from dataclasses import replace

import pytest
import torch

from mst_train.attention import select_attention
from mst_train.config import ModelConfig
from mst_train.memory.tracker import MemoryTracker
from mst_train.model import Policy, build_model
from mst_train.mst import ATTENTION, KEYS, MLP, OUTPUT, PIECES, QUERIES, Documents, Offload

CPU = torch.device("cpu")
LLAMA = ModelConfig(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=40,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
)
FAMILIES = {
    "llama": LLAMA,
    "qwen2": replace(LLAMA, qkv_bias=True, tie_embeddings=True),
    "qwen3": replace(LLAMA, qk_norm="head", head_size=10),
    "olmo2": replace(LLAMA, qk_norm="projection", norm_placement="after"),
    "gemma2": replace(
        LLAMA,
        norm_placement="around",
        activation="gelu_tanh",
        sliding_window=9,
        sliding_window_pattern=["sliding", "full"],
        attention_softcap=20.0,
    ),
    "gpt_oss": replace(
        LLAMA,
        qkv_bias=True,
        output_bias=True,
        attention_sinks=True,
        sliding_window=9,
        sliding_window_pattern=["sliding", "full"],
    ),
}
SEQUENCE, OFFSETS = 29, [0, 7, 8, 21, 29, 58]


def step(config, policy, *, attention="auto", offload=False, documents=None):
    model = build_model(
        config,
        policy=policy,
        attention=select_attention(attention, CPU, torch.float64),
        dtype=torch.float64,
        seed=3,
    )
    model.offload = Offload(CPU) if offload else None
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(config.vocab_size, (2, SEQUENCE + 1), generator=generator)
    loss_sum, _ = model(sequences[:, :-1], sequences[:, 1:], documents=documents)
    loss_sum.backward()
    return [loss_sum.detach(), *(p.grad for p in model.parameters())]


def assert_plain(config, policy, **options):
    documents = {"documents": options.get("documents")}
    torch.testing.assert_close(
        step(config, policy, **options), step(config, Policy(), **documents), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("chunk", [4, 2 * SEQUENCE])
@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_piece(family, piece, chunk):
    policy = Policy(True, True, 7, 11, keep={piece: "all"}, block_chunk_tokens=chunk)
    assert_plain(FAMILIES[family], policy)


@pytest.mark.parametrize("seed", range(20))
def test_mixes_of_blocks(seed):
    draw = random.Random(seed)
    policy = Policy(
        *(True, True, draw.choice([3, 58]), 11),
        keep={piece: draw.choice([0, 1, 2, 3, 4, "all", 9]) for piece in PIECES},
        block_chunk_tokens=draw.choice([2, 10, 24, 58]),
    )
    assert_plain(
        draw.choice(list(FAMILIES.values())),
        policy,
        offload=draw.random() < 0.4,
        documents=draw.choice([None, Documents(torch.tensor(OFFSETS, dtype=torch.int32))]),
    )


@pytest.mark.parametrize("piece", PIECES)
def test_blocks_of_one_piece(piece):
    """Where attention cannot go chunk by chunk."""
    assert_plain(LLAMA, Policy(True, True, 7, 11, keep={piece: 3}), attention="sdpa")


def test_it_is_kept_in_the_last_blocks():
    policy = Policy(keep={MLP: 1, QUERIES: 2, ATTENTION: "all", OUTPUT: 0, KEYS: 7})
    kept = [policy.kept_in(block, 3) for block in range(3)]
    assert kept == [{KEYS, ATTENTION}, {KEYS, ATTENTION, QUERIES}, {KEYS, ATTENTION, QUERIES, MLP}]


@pytest.mark.parametrize("chunk", [4, 2 * SEQUENCE])
def test_what_is_kept_is_what_memory_it_takes(chunk):
    """To the byte, per token: 2 x 2 keys, queries, the output's result, and gate with up."""
    sizes = {KEYS: 24, QUERIES: 24, OUTPUT: 24, MLP: 80}

    def live(keep):
        policy = Policy(True, True, 7, 11, keep=keep, block_chunk_tokens=chunk)
        attention = select_attention("auto", CPU, torch.float64)
        model = build_model(LLAMA, policy=policy, attention=attention, dtype=torch.float64)
        tokens = torch.zeros(2, SEQUENCE, dtype=torch.int64)
        with MemoryTracker() as tracker:
            loss_sum, _ = model(tokens, tokens)
            found = tracker.live_bytes
            loss_sum.backward()
        return found

    kept_nothing = live({})
    for piece, features in sizes.items():
        assert live({piece: 2}) - kept_nothing == 2 * 2 * SEQUENCE * features * 8
