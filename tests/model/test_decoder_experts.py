"""Mixtures of experts: no policy changes a result, with or without the losses of their routers."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mst_train.attention import select_attention
from mst_train.config import ModelConfig
from mst_train.model import Policy, build_model
from mst_train.model.experts import untaught_routers
from mst_train.mst import KEYS, OUTPUT, QUERIES, Documents, Offload

CPU = torch.device("cpu")
MOE = ModelConfig(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=20,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    num_experts=5,
    experts_per_token=2,
)
BALANCED = replace(MOE, balance_loss=0.3, router_z_loss=0.2)
AROUND = replace(BALANCED, norm_placement="around", normalize_experts=False)
GPT_OSS = replace(
    BALANCED,
    expert_bias=True,
    activation="clamped_swiglu",
    attention_sinks=True,
    qkv_bias=True,
    output_bias=True,
    sliding_window=9,
    sliding_window_pattern=["sliding", "full"],
)
SEQUENCE, OFFSETS = 29, [0, 7, 8, 21, 29, 58]


def make(config, policy=None, *, attention="auto", offload=False):
    model = build_model(
        config,
        policy=policy,
        attention=select_attention(attention, CPU, torch.float64),
        dtype=torch.float64,
        seed=3,
    )
    for block in model.blocks:  # as they start, routers hardly prefer an expert
        torch.nn.init.normal_(block.mlp.router.weight, 0, 0.4)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0, 0.3)
    model.offload = Offload(CPU) if offload else None
    return model


def batch(config, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.randint(config.vocab_size, (2, SEQUENCE + 1), generator=generator)
    labels = sequences[:, 1:].clone()
    labels[0, :5] = -100
    return sequences[:, :-1], labels


def step(config, policy, *, scale=1.0, documents=None, **options):
    torch.manual_seed(0)
    model = make(config, policy, **options)
    loss_sum, _ = model(*batch(config), documents=documents)
    (scale * loss_sum).backward()
    return [loss_sum.detach(), *(p.grad for p in model.parameters())]


def by_formula(config, scale=1.0):
    """The losses written out, on the logits of a model that knows nothing of them."""
    torch.manual_seed(0)
    model = make(replace(config, balance_loss=0, router_z_loss=0))
    inputs = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda mlp, args: inputs.append((mlp, args[0])))
    loss_sum, valid_tokens = model(*batch(config))
    logits = torch.cat([mlp.router(x).flatten(0, 1) for mlp, x in inputs])
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(config.experts_per_token).indices
    times = F.one_hot(chosen, config.num_experts).sum(1).double().mean(0)
    balance = config.num_experts * (times * probabilities.mean(0)).sum()
    z = logits.logsumexp(-1).square().mean()
    loss_sum = loss_sum + valid_tokens * (config.balance_loss * balance + config.router_z_loss * z)
    (scale * loss_sum).backward()
    return [loss_sum.detach(), *(p.grad for p in model.parameters())]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


POLICIES = {
    "vanilla": Policy(),
    "recompute": Policy(recompute=True),
    "experts in chunks": Policy(mini_sequence=True, mlp_chunk_tokens=7, head_chunk_tokens=11),
    "blocks in chunks": Policy(True, True, 7, 11, block_chunk_tokens=10),
    "blocks in one chunk": Policy(True, True, 58, 11, block_chunk_tokens=58),
}


@pytest.mark.parametrize("config", [BALANCED, AROUND, GPT_OSS], ids=["before", "around", "gpt-oss"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_the_losses_and_gradients_of_the_formula(policy, config):
    assert_close(step(config, POLICIES[policy], scale=0.7), by_formula(config, scale=0.7))


def test_blocks_of_one_piece():
    """Where attention cannot go chunk by chunk."""
    policy = Policy(True, True, 7, 11)
    assert_close(step(BALANCED, policy, attention="sdpa"), by_formula(BALANCED))


def test_the_losses_are_beside_the_mean_loss():
    """At least 0.3 for each token that has a label: balance is 1 where experts are equally used."""
    with_losses, without = step(BALANCED, Policy())[0], step(MOE, Policy())[0]
    assert with_losses - without > 0.3 * 53 * 0.9


@pytest.mark.parametrize("seed", range(12))
def test_mixes(seed):
    draw = random.Random(seed)
    config = draw.choice([MOE, BALANCED, AROUND, replace(BALANCED, experts_per_token=1), GPT_OSS])
    policy = Policy(
        *(True, True, draw.choice([3, 58]), 11),
        keep={piece: draw.choice([0, 1, 2, "all"]) for piece in (KEYS, QUERIES, OUTPUT)},
        block_chunk_tokens=draw.choice([2, 10, 24, 58]),
    )
    documents = draw.choice([None, Documents(torch.tensor(OFFSETS, dtype=torch.int32))])
    offload = draw.random() < 0.4
    assert_close(
        step(config, policy, offload=offload, documents=documents),
        step(config, Policy(), documents=documents),
    )


def test_two_forwards_before_their_backwards():
    """Each has its own losses."""
    torch.manual_seed(0)
    model = make(BALANCED, POLICIES["blocks in chunks"])
    losses = [model(*batch(BALANCED, seed))[0] for seed in (1, 2)]
    sum(losses).backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for seed in (1, 2):
        model(*batch(BALANCED, seed))[0].backward()
    assert_close([p.grad for p in model.parameters()], together)


def test_how_the_experts_are_used():
    torch.manual_seed(0)
    model = make(MOE, POLICIES["blocks in chunks"])
    assert model.expert_load is None
    model(*batch(MOE))
    load = model.expert_load
    assert load.shape == (5,)
    assert load.sum().item() == pytest.approx(1)
    times = load * 2 * SEQUENCE * 2 * 3
    torch.testing.assert_close(times, times.round())
    loss = model(*batch(MOE))[0]
    loss.backward()
    assert torch.equal(load, model.expert_load)  # what runs again is not counted again


def test_hidden_states_have_no_losses():
    model = make(BALANCED, Policy())
    hidden = model.hidden(batch(BALANCED)[0])
    hidden.sum().backward()
    assert model.blocks[0].mlp.router.weight.grad.any()


@pytest.mark.parametrize(
    ("changes", "taught"),
    [
        ({"experts_per_token": 1}, False),
        ({"experts_per_token": 1, "normalize_experts": False}, True),
        ({}, True),
    ],
)
def test_routers_that_the_loss_does_not_teach_are_told(changes, taught):
    config = replace(MOE, **changes)
    model = make(config, Policy(recompute=True, mini_sequence=True))
    loss_sum, _ = model(*batch(config))
    loss_sum.backward()
    largest = max(block.mlp.router.weight.grad.abs().max() for block in model.blocks)
    assert (largest > 1e-6) == taught
    assert (untaught_routers(config) is None) == taught
    assert untaught_routers(replace(config, num_experts=None)) is None


@pytest.mark.parametrize("config", [BALANCED, replace(MOE, num_experts=None)])
def test_a_recomputed_step_has_several_backwards(config):
    model = build_model(
        config,
        policy=Policy(recompute=True),
        attention=select_attention("auto", CPU, torch.float64),
        dtype=torch.float64,
        seed=3,
    )
    loss_sum, _ = model(*batch(config))
    parameters = list(model.parameters())
    once = torch.autograd.grad(loss_sum, parameters, retain_graph=True)
    for gradient, again in zip(once, torch.autograd.grad(loss_sum, parameters), strict=True):
        assert torch.equal(gradient, again)
