"""Decoding token after token gives the logits of the whole text at once."""

import dataclasses

import pytest
import torch

from mst_train.attention import select_attention
from mst_train.cli.compose import compose
from mst_train.cli.config_folders import choices
from mst_train.generate.decode import CachedAttention, continuation
from mst_train.model import build_model

CPU = torch.device("cpu")
LENGTH = 20


def tiny(preset):
    """A preset's model with small sizes, its windows and lengths in proportion."""
    config = compose([f"model={preset}"]).model
    scaling = config.rope_scaling
    if scaling.original_length is not None:
        scaling = dataclasses.replace(scaling, original_length=16)
    return dataclasses.replace(
        config,
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4 if config.num_kv_heads == config.num_heads else 2,
        head_size=config.head_size and 10,
        sliding_window=config.sliding_window and 7,
        rope_scaling=scaling,
        max_positions=12,  # which the text is longer than
        initializer_std=0.2,
    )


def make_model(config, attending=lambda attention: attention):
    attention = attending(select_attention("auto", CPU, torch.float64))
    model = build_model(config, attention=attention, dtype=torch.float64, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which start at one number
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def sinking(config):
    """As gpt-oss has it."""
    return dataclasses.replace(config, attention_sinks=True, qkv_bias=True, output_bias=True)


@pytest.mark.parametrize(
    ("preset", "more"),
    [*((name, None) for name in choices("model")), ("gemma2_2b", sinking), ("llama3_8b", sinking)],
)
def test_logits_are_those_of_the_whole_text(preset, more):
    config = more(tiny(preset)) if more else tiny(preset)
    text = torch.randint(97, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        expected = make_model(config).logits(torch.tensor([text]))[0]
    for prompt in (1, 5, 9):  # a window holds seven
        following, logits = iter(text[prompt:]), []

        def choose(found, following=following, logits=logits):
            logits.append(found)
            return next(following, -1)

        model = make_model(config, CachedAttention)
        chosen = continuation(model, text[:prompt], choose)
        assert [next(chosen) for _ in range(LENGTH - prompt)] == text[prompt:]
        next(chosen)
        assert not logits[0].requires_grad
        torch.testing.assert_close(
            torch.stack(logits), expected[prompt - 1 :], rtol=1e-10, atol=1e-10
        )


def test_a_window_is_all_that_is_kept():
    model = make_model(tiny("gemma2_2b"), CachedAttention)
    chosen = continuation(model, list(range(LENGTH)), lambda logits: int(logits.argmax()))
    for _ in range(5):
        next(chosen)
    kept = [block.attention.attention._kept[0].shape[1] for block in model.blocks]
    assert kept == [7, 24, 7]
