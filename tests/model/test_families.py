"""The decoder in the form of every family: one result under every policy, and what it is made of.

That each form is the family's own, tests/model/test_huggingface.py shows against transformers.
"""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from mst_train.attention import select_attention
from mst_train.cli.compose import compose
from mst_train.cli.config_folders import choices
from mst_train.config import Config, ModelConfig, RopeScalingConfig, validate
from mst_train.errors import UserError
from mst_train.model import Policy, build_model
from mst_train.model.flops import (
    active_parameter_count,
    matrix_parameters,
    parameter_count,
    training_flops,
)
from mst_train.model.rope import beyond_positions, idle_scaling
from mst_train.mst import Documents, Offload

CPU = torch.device("cpu")
SEQUENCE = 29
SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "initializer_std": 0.2,
}
GEMMA2 = {
    "head_size": 10,
    "tie_embeddings": True,
    "scale_embeddings": True,
    "activation": "gelu_tanh",
    "norm_placement": "around",
    "norm_offset": True,
    "sliding_window": 7,
    "sliding_window_pattern": ["sliding", "full"],
    "attention_scale": 0.4,
    "attention_softcap": 2.0,
    "logit_softcap": 3.0,
}
FORMS = {
    "llama3_2": {
        "tie_embeddings": True,
        "rope_scaling": RopeScalingConfig("llama3", 8.0, 16),
    },
    "mistral": {"sliding_window": 6},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head", "head_size": 10},
    "gemma2": GEMMA2,
    "olmo2": {"qk_norm": "projection", "norm_placement": "after"},
    "mixtral": {"num_experts": 5, "experts_per_token": 2},
    "olmoe": {
        "num_experts": 7,
        "experts_per_token": 3,
        "normalize_experts": False,
        "qk_norm": "projection",
    },
    "gpt_oss": {
        "qkv_bias": True,
        "output_bias": True,
        "attention_sinks": True,
        "head_size": 10,
        "sliding_window": 7,
        "sliding_window_pattern": ["sliding", "full"],
    },
}
POLICIES = {
    "recompute": Policy(recompute=True),
    "chunks": Policy(True, True, 7, 11, block_chunk_tokens=18),
    "single rows": Policy(True, True, 1, 1, block_chunk_tokens=1),
    "attention again": Policy(True, True, 9, 5, {}, 14),
    "one chunk": Policy(True, True, 1000, 1000, block_chunk_tokens=1000),
    "without blocks": Policy(False, True, 7, 11),
}


def make_model(form, policy=None, dtype=torch.float64, attention="auto"):
    config = ModelConfig(**SIZES | FORMS[form])
    chosen = select_attention(attention, CPU, dtype)
    model = build_model(config, policy=policy, attention=chosen, dtype=dtype, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which start at one number
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def make_batch(rows=2):
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(SIZES["vocab_size"], (rows, SEQUENCE + 1), generator=generator)
    labels = sequences[:, 1:].clone()
    labels[:, 5:9] = -100
    return sequences[:, :-1], labels


def step(model, *batch):
    model.zero_grad()
    loss_sum, _ = model(*batch)
    loss_sum.backward()
    return loss_sum.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=0)
    for name, gradient in actual[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("offload", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", FORMS)
def test_every_policy_gives_the_plain_gradients(form, policy, offload):
    if offload and not (POLICIES[policy].recompute and POLICIES[policy].mini_sequence):
        pytest.skip("nothing is kept that could be offloaded")
    model = make_model(form, POLICIES[policy])
    model.offload = Offload(CPU) if offload else None
    assert_same(step(model, *make_batch()), step(make_model(form), *make_batch()))


@pytest.mark.parametrize("attention", ["reference", "tiled", "cpu"])
@pytest.mark.parametrize("form", FORMS)
def test_every_attention_gives_the_same(form, attention):
    policy = POLICIES["chunks"]
    actual = step(make_model(form, policy, attention=attention), *make_batch())
    assert_same(actual, step(make_model(form, attention="reference"), *make_batch()))


@pytest.mark.parametrize("policy", [None, *POLICIES.values()])
@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_equal_each_document_alone(form, policy):
    tokens, labels = make_batch()
    offsets = [0, 4, 5, 20, SEQUENCE, SEQUENCE + 12, 2 * SEQUENCE]
    flat_tokens, flat_labels = tokens.reshape(1, -1), labels.reshape(1, -1)
    model = make_model(form)
    for start, end in pairwise(offsets):
        model(flat_tokens[:, start:end], flat_labels[:, start:end])[0].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(offsets)])
    documents = Documents(torch.tensor(offsets, dtype=torch.int32))
    packed = make_model(form, policy)
    packed(tokens, labels, positions.view(tokens.shape), documents)[0].backward()
    for name, p in packed.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_loss_is_that_of_the_logits(form):
    model, (tokens, labels) = make_model(form), make_batch()
    expected = torch.nn.functional.cross_entropy(
        model.logits(tokens).flatten(0, 1), labels.flatten(), reduction="sum"
    )
    torch.testing.assert_close(model(tokens, labels)[0], expected, rtol=1e-12, atol=0)


def test_logits_are_capped():
    model, (tokens, _) = make_model("gemma2"), make_batch()
    uncapped = model.head(model.hidden(tokens))
    assert uncapped.abs().max() > 3
    torch.testing.assert_close(model.logits(tokens), 3 * torch.tanh(uncapped / 3))


def test_a_token_sees_one_window_in_each_layer():
    model, (tokens, _) = make_model("mistral"), make_batch()
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % SIZES["vocab_size"]
    same = torch.isclose(model.logits(tokens), model.logits(changed), rtol=1e-13, atol=1e-13)
    reach = 3 * (6 - 1)  # three layers, each of them five tokens further
    expected = torch.ones(SEQUENCE, dtype=torch.bool)
    expected[3 : 3 + reach + 1] = False
    assert torch.equal(same.all(-1), expected.expand(2, -1))


def test_layers_take_turns():
    model = make_model("gemma2")
    windows = [block.attention.attention.kernel.scores.window for block in model.blocks]
    assert windows == [7, None, 7]
    assert [model.config.window(layer) for layer in range(3)] == windows


@pytest.mark.parametrize("form", FORMS)
def test_initialisation(form):
    """Norms multiply by one, biases add nothing, matrices and sinks have their spread."""
    config = dataclasses.replace(
        ModelConfig(**SIZES | FORMS[form]), hidden_size=256, num_layers=8, initializer_std=0.02
    )
    for name, parameter in build_model(config, seed=0).named_parameters():
        if parameter.ndim == 1 and not name.endswith("sinks"):
            factor = 0.0 if name.endswith("bias") or config.norm_offset else 1.0
            assert (parameter == factor).all(), name
            continue
        residual = name.endswith(("attention.output.weight", "down.weight", "down"))
        std = 0.02 / (math.sqrt(2 * config.num_layers) if residual else 1)
        assert abs(parameter.std() - std) < 5 * std / math.sqrt(parameter.numel()), name


PUBLISHED = {
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "llama2_7b": 6_738_415_616,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "mixtral_8x7b": 46_702_792_704,
    "olmo2_7b": 7_298_617_344,
    "olmoe_1b_7b": 6_919_161_856,
    "qwen2_7b": 7_615_616_512,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_8b": 8_190_735_360,
}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_counted(form):
    config = ModelConfig(**SIZES | FORMS[form])
    count = sum(p.numel() for p in build_model(config, device="meta").parameters())
    assert count == parameter_count(config)


def test_matrices_are_those_that_a_token_goes_through():
    sparse = ModelConfig(**SIZES | FORMS["mixtral"])
    dense = dataclasses.replace(sparse, num_experts=None)
    one, routers = 3 * 24 * 40, 3 * 24 * 5
    more = matrix_parameters(sparse) - matrix_parameters(dense)
    assert more == 3 * one + routers  # in each of three layers a second expert, and the router
    assert parameter_count(sparse) - parameter_count(dense) == 3 * 4 * one + routers


@pytest.mark.parametrize(
    ("preset", "billions"), [("mixtral_8x7b", 12.9), ("olmoe_1b_7b", 1.3), ("qwen3_30b_a3b", 3.3)]
)
def test_what_a_token_uses_is_what_is_published(preset, billions):
    config = compose([f"model={preset}"]).model
    assert active_parameter_count(config) / 1e9 == pytest.approx(billions, abs=0.06)
    plain = dataclasses.replace(config, num_experts=None)
    assert active_parameter_count(plain) == parameter_count(plain)


@pytest.mark.parametrize("preset", choices("model"))
def test_sizes(preset):
    config = compose([f"model={preset}"]).model
    count = sum(p.numel() for p in build_model(config, device="meta").parameters())
    assert count == parameter_count(config)
    assert count == PUBLISHED.get(preset, count)


def test_flops_count_what_the_windows_leave():
    config = ModelConfig(**SIZES | GEMMA2)
    pairs = sum(
        min(config.window(layer) or SEQUENCE, place + 0.5)  # half of a token's own score
        for layer in range(3)
        for place in range(SEQUENCE)
    )
    dense = 6 * matrix_parameters(config) * SEQUENCE
    heads = config.num_heads * config.head_dim
    assert training_flops(config, SEQUENCE) == pytest.approx(dense + 12 * pairs * heads, rel=1e-3)
    wide = dataclasses.replace(config, sliding_window=1000)
    full = dataclasses.replace(config, sliding_window=None)
    assert training_flops(wide, SEQUENCE) == training_flops(full, SEQUENCE)


def test_a_backend_without_windows_is_refused_where_the_model_is_built():
    with pytest.raises(UserError, match=r"kernel\.attention=sdpa cannot be used: it has no slid"):
        make_model("mistral", attention="sdpa")


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_valid(form):
    assert validate(Config(model=ModelConfig(**SIZES | FORMS[form]))) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "relu"}, "model.activation=relu is not one of silu, gelu_tanh"),
        ({"norm_placement": "between"}, "model.norm_placement=between is not one of before"),
        ({"qk_norm": "all"}, "model.qk_norm=all is not one of none, head, projection"),
        ({"attention_softcap": 0.0}, "model.attention_softcap=0.0 must be greater than 0"),
        ({"logit_softcap": -1.0}, "model.logit_softcap=-1.0 must be greater than 0"),
        ({"attention_scale": 0.0}, "model.attention_scale=0.0 must be greater than 0"),
        ({"num_experts": 0}, "model.num_experts=0 must be at least 1"),
        ({"num_experts": 4, "experts_per_token": 0}, "model.experts_per_token=0 must be at least"),
        ({"num_experts": 4, "experts_per_token": 5}, "model.experts_per_token=5 is more than"),
        ({"balance_loss": -0.1}, "model.balance_loss=-0.1 must be at least 0 and below"),
        ({"balance_loss": math.inf}, "model.balance_loss=inf must be at least 0 and below"),
        ({"balance_loss": 0.1}, "model.balance_loss=0.1 is a loss of routers, and there are none"),
        ({"router_z_loss": 0.1}, "model.router_z_loss=0.1 is a loss of routers, and there are"),
        ({"max_positions": 0}, "model.max_positions=0 must be at least 1"),
        ({"sliding_window": 0}, "model.sliding_window=0 must be at least 1"),
        ({"sliding_window_pattern": []}, "model.sliding_window_pattern is empty"),
        (
            {"sliding_window_pattern": ["local", "local", "full"]},
            "model.sliding_window_pattern=local is not one of sliding, full",
        ),
        (
            {"sliding_window": 8, "sliding_window_pattern": ["full"]},
            "model.sliding_window=8 is used by no layer",
        ),
        (
            {"rope_scaling": RopeScalingConfig("dynamic")},
            "model.rope_scaling.type=dynamic is not one of none, linear, ntk, yarn, llama3",
        ),
        (
            {"rope_scaling": RopeScalingConfig("linear", 0.5)},
            "model.rope_scaling.factor=0.5 must be at least 1",
        ),
        (
            {"rope_scaling": RopeScalingConfig(factor=2.0)},
            "model.rope_scaling.factor=2.0 does nothing with model.rope_scaling.type=none",
        ),
        (
            {"rope_scaling": RopeScalingConfig("yarn", 2.0)},
            "model.rope_scaling.type=yarn needs model.rope_scaling.original_length",
        ),
        (
            {"rope_scaling": RopeScalingConfig("llama3", 2.0, 0)},
            "model.rope_scaling.original_length=0 must be at least 1",
        ),
        (
            {"rope_scaling": RopeScalingConfig("linear", 2.0, 8)},
            "model.rope_scaling.original_length is not used with model.rope_scaling.type=linear",
        ),
        (
            {"rope_scaling": RopeScalingConfig("llama3", 2.0, 8, low_frequency_factor=4.0)},
            "model.rope_scaling.high_frequency_factor=4.0 must be greater than",
        ),
        (
            {"rope_scaling": RopeScalingConfig("yarn", 2.0, 8, beta_fast=1.0)},
            "model.rope_scaling.beta_fast=1.0 must be greater than model.rope_scaling.beta_slow",
        ),
        (
            {"rope_scaling": RopeScalingConfig("ntk", 2.0, attention_factor=1.0)},
            "model.rope_scaling.attention_factor is not used with model.rope_scaling.type=ntk",
        ),
        (
            {"rope_scaling": RopeScalingConfig("ntk", 2.0), "head_size": 2},
            "model.rope_scaling.type=ntk slows down all frequencies but the fastest",
        ),
    ],
)
def test_what_is_refused(settings, message):
    problems = validate(Config(model=ModelConfig(**SIZES | settings)))
    assert len(problems) == 1
    assert problems[0].startswith(message)


def test_settings_from_the_command_line():
    config = compose(
        [
            "model=gemma2_9b",
            "model.sliding_window_pattern=[full, sliding]",
            "model.rope_scaling.type=linear",
            "model.rope_scaling.factor=4",
        ]
    ).model
    assert config.window(0) is None
    assert config.window(41) == 4096
    assert config.rope_scaling == RopeScalingConfig("linear", 4.0)


def test_stretching_without_a_factor_is_warned_of():
    said = idle_scaling(RopeScalingConfig("yarn"))
    assert said is not None and "model.rope_scaling.type=yarn does nothing" in said
    assert idle_scaling(RopeScalingConfig("yarn", 4.0)) is None
    assert idle_scaling(RopeScalingConfig()) is None


def test_a_checkpoint_at_lengths_that_it_does_not_know_is_warned_of():
    plain = ModelConfig(max_positions=256)
    pretrained = dataclasses.replace(plain, from_pretrained="folder")
    assert beyond_positions(plain, 1024) is None
    assert beyond_positions(pretrained, 256) is None
    assert beyond_positions(dataclasses.replace(pretrained, max_positions=None), 1024) is None
    said = beyond_positions(pretrained, 1000)
    assert said is not None and "beyond the 256 positions that folder knows" in said
    assert "model.rope_scaling.factor=4 stretches them" in said
    yarn = RopeScalingConfig(type="yarn", factor=4.0, original_length=256)
    stretched = dataclasses.replace(pretrained, rope_scaling=yarn)
    assert beyond_positions(stretched, 1024) is None
    said = beyond_positions(stretched, 2048)
    assert said is not None and "the 1024 positions" in said and "factor=8 " in said
