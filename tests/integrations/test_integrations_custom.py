"""What somebody has done to a transformers model: kept, or refused by name."""

import copy
import functools
import io
import types

import pytest
import torch

from mst_train.errors import UserError

transformers = pytest.importorskip("transformers")

from hf_models import CHUNKS, assert_same, make_batch, make_model, step  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from mst_train.integrations.huggingface import (  # noqa: E402
    apply_mini_sequence,
    remove_mini_sequence,
)


def module_of(model, name):
    return {
        "model": lambda: model,
        "trunk": lambda: model.model,
        "layer": lambda: model.model.layers[1],
        "attention": lambda: model.model.layers[1].self_attn,
        "mlp": lambda: model.model.layers[1].mlp,
        "up": lambda: model.model.layers[1].mlp.up_proj,
        "query": lambda: model.model.layers[1].self_attn.q_proj,
        "norm": lambda: model.model.layers[1].input_layernorm,
        "head": lambda: model.lm_head,
    }[name]()


def scaled(output):
    """The same with its first tensor larger."""
    if isinstance(output, torch.Tensor):
        return output * 1.25
    if isinstance(output, tuple):
        return (output[0] * 1.25, *output[1:])
    key = "loss" if "loss" in output else "last_hidden_state"
    output[key] = output[key] * 1.25
    return output


def hook(module):
    module.register_forward_hook(lambda module, args, output: scaled(output))


def wrapped(module):
    held = module.forward
    module.forward = lambda *args, **kwargs: scaled(held(*args, **kwargs))


def decorated(module):
    """As decorators do it: with a ``__wrapped__``, bound."""
    held = module.forward.__func__

    @functools.wraps(held)
    def forward(self, *args, **kwargs):
        return scaled(held(self, *args, **kwargs))

    module.forward = types.MethodType(forward, module)


BEHAVIOURS = {"hook": hook, "own forward": wrapped, "decorated": decorated}
CALLED = ["mlp", "up", "query", "norm", "head"]
REPLACED = ["model", "trunk", "layer"]
"""Modules that get another forward."""


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("order", ["before", "after"])
def test_modules_that_are_called_keep_what_they_have(name, behaviour, order):
    model, batch = make_model(dtype=torch.float64), make_batch()
    plain = step(model, **batch)
    twin = copy.deepcopy(model)
    BEHAVIOURS[behaviour](module_of(model, name))
    expected = step(model, **batch)
    assert abs(expected[0] - plain[0]) > 1e-4
    if order == "after":
        model = apply_mini_sequence(twin, **CHUNKS)
        BEHAVIOURS[behaviour](module_of(model, name))
    else:
        apply_mini_sequence(model, **CHUNKS)
    assert_same(step(model, **batch), expected)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("name", REPLACED)
def test_what_is_put_around_model_trunk_and_layers_afterwards_is_kept(name, behaviour):
    model, batch = make_model(dtype=torch.float64), make_batch()
    twin = apply_mini_sequence(copy.deepcopy(model), **CHUNKS)
    for each in (model, twin):
        BEHAVIOURS[behaviour](module_of(each, name))
    assert_same(step(twin, **batch), step(model, **batch))
    assert twin(**batch).logits is None


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("name", REPLACED)
def test_what_is_around_model_trunk_and_layers_before_is_kept_or_refused(name, behaviour):
    model, batch = make_model(dtype=torch.float64), make_batch()
    BEHAVIOURS[behaviour](module_of(model, name))
    if behaviour == "hook":
        expected = step(model, **batch)
        assert_same(step(apply_mini_sequence(model, **CHUNKS), **batch), expected)
    else:
        with pytest.raises(UserError, match=r"has a forward of its own .*test_integrations_custom"):
            apply_mini_sequence(model)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_what_is_done_to_attention_is_refused(behaviour):
    text = "layer 1: self_attn has a (hook|forward of its own) .*test_integrations_custom"
    model = make_model()
    BEHAVIOURS[behaviour](module_of(model, "attention"))
    with pytest.raises(UserError, match=text):
        apply_mini_sequence(model)
    model = apply_mini_sequence(make_model())
    BEHAVIOURS[behaviour](module_of(model, "attention"))
    with pytest.raises(RuntimeError, match=text):
        model(**make_batch())
    # As the model was it still can.
    assert remove_mini_sequence(model)(**make_batch()).logits is not None


def attention_registered(monkeypatch, model):
    def mine(*args, **kwargs):
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "mine", mine)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "mine", sdpa_mask)
    model.set_attn_implementation("mine")
    return "layer 0(, 1, 2)?: attention 'mine' is .*mine and not transformers' own"


def mask_registered(monkeypatch, model):
    def mine(*args, **kwargs):
        return sdpa_mask(*args, **kwargs)

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", mine)
    model.set_attn_implementation("sdpa")
    return "layer 0(, 1, 2)?: attention 'sdpa' is .*mine and not transformers' own"


def patch(owner, name):
    def patched(monkeypatch, model):
        held = getattr(owner, name)

        @functools.wraps(held)
        def mine(*args, **kwargs):
            return held(*args, **kwargs)

        monkeypatch.setattr(owner, name, mine)
        return r"runs test_integrations_custom\..*mine, which is not transformers' own"

    return patched


REWRITTEN = {
    "attention registered": attention_registered,
    "mask registered": mask_registered,
    "attention's class": patch(modeling_llama.LlamaAttention, "forward"),
    "layers' class": patch(modeling_llama.LlamaDecoderLayer, "forward"),
    "trunk's class": patch(modeling_llama.LlamaModel, "forward"),
    "model's class": patch(modeling_llama.LlamaForCausalLM, "forward"),
    "rotary embedding": patch(modeling_llama, "apply_rotary_pos_emb"),
    "its helper": patch(modeling_llama, "rotate_half"),
    "eager attention": patch(modeling_llama, "eager_attention_forward"),
    "mask": patch(modeling_llama, "create_causal_mask"),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_what_is_not_transformers_own_is_refused(name, monkeypatch):
    before, after = make_model(), apply_mini_sequence(make_model())
    text = REWRITTEN[name](monkeypatch, before)
    after.set_attn_implementation(before.config._attn_implementation)
    with pytest.raises(UserError, match=text):
        apply_mini_sequence(before)
    with pytest.raises(RuntimeError, match=text):
        after(**make_batch())


def test_a_linear_layer_that_is_patched_for_all_is_called(monkeypatch):
    model, batch = make_model(dtype=torch.float64), make_batch()
    held = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: held(self, x) * 1.1)
    expected = step(model, **batch)
    assert_same(step(apply_mini_sequence(model, **CHUNKS), **batch), expected)


@pytest.mark.parametrize("name", ["trunk", "layer"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_forward_that_does_not_come_to_ours_is_refused(name, implementation):
    model = apply_mini_sequence(make_model())
    model.set_attn_implementation(implementation)
    module = module_of(model, name)
    theirs = type(module).__mro__[1].forward
    module.forward = lambda *args, **kwargs: theirs(module, *args, **kwargs)
    text = "the model's trunk has not run" if name == "trunk" else "layer 1 has not run"
    with pytest.raises(RuntimeError, match=text):
        model(**make_batch())


def test_a_hook_that_gives_layers_a_mask_is_refused():
    model = apply_mini_sequence(make_model())

    def masked(module, args, kwargs):
        return args, kwargs | {"attention_mask": None}

    model.model.layers[2].register_forward_pre_hook(masked, with_kwargs=True)
    with pytest.raises(RuntimeError, match="layer 2 has not run in mini-sequences"):
        model(**make_batch())


def test_a_model_forward_that_does_not_come_to_ours_is_told(warnings):
    model = apply_mini_sequence(make_model())
    theirs = type(model).__mro__[1].forward
    model.forward = lambda **kwargs: theirs(model, **kwargs)
    for _ in range(2):
        model(**make_batch())
    (message,) = warnings()
    assert "the model's trunk is called by something else" in message


def test_attentions_that_were_asked_for_once_do_no_harm(warnings):
    model, batch = make_model(dtype=torch.float64), make_batch()
    expected = step(model, **batch)
    model(**batch, output_attentions=True, output_hidden_states=True)
    assert_same(step(apply_mini_sequence(model, **CHUNKS), **batch), expected)
    assert not warnings()


@pytest.mark.parametrize("name", ["dropout", "is_causal"])
def test_attention_that_is_told_otherwise_is_refused(name):
    def change(model):
        attention = model.model.layers[2].self_attn
        if name == "dropout":
            attention.attention_dropout = 0.1
        else:
            attention.is_causal = False

    before, after = make_model(), apply_mini_sequence(make_model())
    change(before), change(after)
    with pytest.raises(UserError, match=f"layer 2: self_attn.*{name}.* is not supported"):
        apply_mini_sequence(before)
    with pytest.raises(RuntimeError, match=f"layer 2: self_attn.*{name}.* is not supported"):
        after(**make_batch())


def test_a_call_without_causality_is_computed_as_before(warnings):
    model, batch = make_model(dtype=torch.float64), make_batch()
    causal, expected = model(**batch).loss, step(model, **batch, is_causal=False)
    assert abs(causal - expected[0]) > 1e-4
    assert_same(step(apply_mini_sequence(model), **batch, is_causal=False), expected, 1e-14)
    assert "is_causal" in warnings()[0]
    model.config.is_causal = False
    with pytest.raises(UserError, match=r"config\.is_causal"):
        apply_mini_sequence(remove_mini_sequence(model))


@pytest.mark.parametrize("behaviour", ["hook", "other module"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_what_is_done_to_an_activation_is_kept(behaviour, order):
    def change(model):
        for layer in model.model.layers:
            if behaviour == "hook":
                hook(layer.mlp.act_fn)
            else:
                layer.mlp.act_fn = torch.nn.GELU()
        return model

    plain, batch = change(make_model(dtype=torch.float64)), make_batch()
    if order == "before":
        model = apply_mini_sequence(change(make_model(dtype=torch.float64)), **CHUNKS)
    else:
        model = change(apply_mini_sequence(make_model(dtype=torch.float64), **CHUNKS))
    assert_same(step(model, **batch), step(plain, **batch))


def test_windows_are_those_of_a_layer_s_place():
    """Where layers have been taken out, not of the place that a layer once had."""
    model = make_model("gemma2", torch.float64, num_hidden_layers=4)
    del model.model.layers[1]
    model.config.num_hidden_layers, model.config.use_cache = 3, False
    expected = step(model, **make_batch())
    assert_same(step(apply_mini_sequence(model, **CHUNKS), **make_batch()), expected)


def test_a_softcap_is_the_attention_s_own():
    model = make_model("gemma2", torch.float64)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.7
    expected = step(model, **make_batch())
    assert_same(step(apply_mini_sequence(model, **CHUNKS), **make_batch()), expected)


# --- files, adapters -----------------------------------------------------------------------------


def test_a_model_is_saved_and_copied_with_its_method():
    model, batch = make_model("gemma2", torch.float64), make_batch()
    expected = step(apply_mini_sequence(model, **CHUNKS), **batch)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert type(twin) is type(model)
        assert twin(**batch).logits is None
        assert_same(step(twin, **batch), expected)
        assert type(remove_mini_sequence(twin)) is transformers.Gemma2ForCausalLM
        assert twin(**batch).logits is not None


def test_an_attention_that_peft_wraps_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.AdaptionPromptConfig(adapter_layers=2, adapter_len=3, task_type="CAUSAL_LM")
    text = "layer 1.*: self_attn is a peft.*AdaptedAttention and not transformers' own"
    model = peft.get_peft_model(apply_mini_sequence(make_model()), config)
    with pytest.raises(RuntimeError, match=text):
        model(**make_batch())
    with pytest.raises(UserError, match=text):
        apply_mini_sequence(peft.get_peft_model(make_model(), config))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "prefix"])
def test_prompts_of_peft(kind, order, warnings):
    peft = pytest.importorskip("peft")
    config = {
        "prompt": peft.PromptTuningConfig,
        "p-tuning": functools.partial(peft.PromptEncoderConfig, encoder_hidden_size=8),
        "prefix": peft.PrefixTuningConfig,
    }[kind](num_virtual_tokens=3, task_type="CAUSAL_LM")
    model, batch = make_model(dtype=torch.float64), make_batch()
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).double()
    expected = step(model, **batch)
    if order == "after":
        torch.manual_seed(0)
        model = peft.get_peft_model(apply_mini_sequence(twin, **CHUNKS), config).double()
    else:
        apply_mini_sequence(model, **CHUNKS)
    assert_same(step(model, **batch), expected)
    # A prefix is a cache.
    assert ["KV cache" in message for message in warnings()] == [True] * (kind == "prefix")


@pytest.mark.parametrize("switch", ["disabled", "scaled", "other", "dropout"])
def test_adapters_that_are_switched_before_the_backward_are_refused(switch):
    peft = pytest.importorskip("peft")
    dropout = 0.5 if switch == "dropout" else 0.0
    lora = peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], lora_dropout=dropout)
    model = peft.get_peft_model(apply_mini_sequence(make_model(), **CHUNKS), lora)
    model.add_adapter("other", lora)
    model.eval()
    loss = model(**make_batch()).loss
    if switch == "disabled":
        model.base_model.disable_adapter_layers()
    elif switch == "scaled":
        model.base_model.model.model.layers[1].mlp.up_proj.set_scale("default", 0.5)
    elif switch == "other":
        model.set_adapter("other", inference_mode=True)
    else:
        model.train()
    with pytest.raises(RuntimeError, match="switched between the forward and the backward"):
        loss.backward()


def test_adapters_that_begin_at_a_token_are_computed_as_before(warnings):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        r=3,
        target_modules=["q_proj", "up_proj"],
        init_lora_weights=False,
        alora_invocation_tokens=[5, 6],
        task_type="CAUSAL_LM",
    )
    model, batch = peft.get_peft_model(make_model(), lora).double(), make_batch()
    batch["input_ids"][:, 10:12] = torch.tensor([5, 6])
    expected = step(model, **batch)
    assert_same(step(apply_mini_sequence(model, **CHUNKS), **batch), expected)
    assert "alora_invocation_tokens" in warnings()[0]


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_adapters_that_always_draw_random_numbers_are_refused_where_layers_run_again(kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, f"{kind}Config")(r=3, target_modules=["q_proj", "up_proj"])
    model, batch = peft.get_peft_model(make_model(), config).double(), make_batch()
    expected = step(model, **batch)
    apply_mini_sequence(model, **CHUNKS)
    with pytest.raises(RuntimeError, match=r"layer 0: self_attn.q_proj draws.*recompute=False"):
        model(**batch)
    assert_same(step(apply_mini_sequence(model, **CHUNKS, recompute=False), **batch), expected)
