"""A transformers model with the method is the model it was: results, files, trainers, adapters."""

import copy

import pytest
import torch

from mst_train.errors import UserError
from mst_train.memory.tracker import MemoryTracker

transformers = pytest.importorskip("transformers")

from hf_models import (  # noqa: E402
    CHUNKS,
    LENGTH,
    MODELS,
    ROWS,
    SCHEMES,
    assert_same,
    make_batch,
    make_model,
    step,
)

from mst_train.integrations.huggingface import (  # noqa: E402
    apply_mini_sequence,
    remove_mini_sequence,
)

# --- loss and gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name, scheme, warnings):
    model, batch = make_model(name, torch.float64), make_batch()
    expected = step(model, **batch)
    logits = model(batch["input_ids"], use_cache=False).logits
    apply_mini_sequence(model, **SCHEMES[scheme])
    assert_same(step(model, **batch), expected)
    output = model(**batch)
    assert output.logits is None and output.past_key_values is None
    # Without labels there are logits, from the same layers in training.
    torch.testing.assert_close(model(batch["input_ids"]).logits, logits, rtol=1e-6, atol=1e-6)
    assert not warnings()


@pytest.mark.parametrize(
    "others",
    [
        {"num_items_in_batch": 57},
        {"num_items_in_batch": torch.tensor(57)},
        {"attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.int64)},
        {"position_ids": torch.arange(7, 7 + LENGTH)[None]},
        {"position_ids": torch.cat([torch.arange(9), torch.arange(14)])[None], "use_cache": False},
        {"position_ids": torch.stack([torch.arange(23), torch.arange(23) % 8]), "use_cache": False},
        {"position_ids": torch.arange(23)[None] % 8},
        {"use_cache": False, "return_dict": True, "output_attentions": False},
    ],
    ids=[
        "items",
        "items tensor",
        "ones",
        "positions",
        "packed",
        "packed rows",
        "not packed: cached",
        "flags",
    ],
)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_what_a_call_can_say(name, others, warnings):
    model, batch = make_model(name, torch.float64), make_batch() | others
    expected = step(model, **batch)
    assert_same(step(apply_mini_sequence(model, **CHUNKS), **batch), expected)
    assert not warnings()


def test_embeddings_and_shifted_labels_in_the_place_of_tokens():
    model, batch = make_model(dtype=torch.float64), make_batch()
    other = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach(),
        "labels": batch["labels"],
        "shift_labels": batch["labels"].roll(-3, 1),
    }
    model.model.embed_tokens.requires_grad_(False)
    expected = step(model, **other)
    assert_same(step(apply_mini_sequence(model, **CHUNKS), **other), expected)


def test_padding_on_the_right_is_exact_and_other_padding_falls_back(warnings):
    model = make_model(dtype=torch.float64)
    batch = make_batch()
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    mask[1, 15:] = 0
    right = batch | {"attention_mask": mask}
    right["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    labelled = batch | {"attention_mask": mask}  # the padding is predicted too
    left = batch | {"attention_mask": mask.flip(1)}
    expected = [step(model, **b) for b in (right, labelled, left)]
    apply_mini_sequence(model, **CHUNKS)
    assert_same(step(model, **right), expected[0])
    assert not warnings()
    for other, truth in ((labelled, expected[1]), (left, expected[2]), (left, expected[2])):
        assert_same(step(model, **other), truth, 1e-14)
        assert model(**other).logits is not None
    (message,) = warnings()
    assert "attention_mask" in message and "pad on the right" in message


@pytest.mark.parametrize(
    "others",
    [
        {"use_cache": True},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"logits_to_keep": LENGTH},
    ],
)
def test_what_mini_sequences_do_not_give_comes_from_the_model_as_it_was(others, warnings):
    model, batch = make_model(dtype=torch.float64), make_batch()
    expected = model(**batch, **others)
    apply_mini_sequence(model)
    output = model(**batch, **others)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.logits, expected.logits)
    assert output.keys() == expected.keys()
    model(**batch, **others)
    assert len(warnings()) == 1


def test_a_gradient_reaches_each_parameter_once():
    model = apply_mini_sequence(make_model("qwen3"), **CHUNKS)
    calls = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    model(**make_batch()).loss.backward()
    assert sorted(calls) == sorted(name for name, _ in model.named_parameters())


# --- the model stays itself ----------------------------------------------------------------------


def test_evaluation_and_generation_are_as_before():
    model, batch = make_model("gemma2").eval(), make_batch()
    prompt = batch["input_ids"]
    attention = {"attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **attention, do_sample=False, max_new_tokens=9)
    with torch.no_grad():
        loss, logits = (model(**batch)[key] for key in ("loss", "logits"))
        apply_mini_sequence(model, **CHUNKS)
        torch.testing.assert_close(model(**batch).loss, loss, rtol=1e-6, atol=0)
        output = model(prompt)
    assert torch.equal(output.logits, logits) and output.past_key_values is not None
    generated = model.generate(prompt, **attention, do_sample=False, max_new_tokens=9)
    assert torch.equal(generated, expected)


def test_files_names_and_removal(tmp_path):
    model = make_model("qwen2")
    kinds = {name: type(module) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_mini_sequence(model, **CHUNKS)
    assert isinstance(model, transformers.Qwen2ForCausalLM)
    assert [type(m).__name__ for m in model.modules()] == [k.__name__ for k in kinds.values()]
    assert model.state_dict().keys() == state.keys()
    model.save_pretrained(tmp_path / "model")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(reloaded) is transformers.Qwen2ForCausalLM
    for name, tensor in reloaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    apply_mini_sequence(model)  # once more, with other settings
    twin = copy.deepcopy(model)
    assert remove_mini_sequence(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert "_mini_sequence" not in vars(model)
    assert model(**make_batch()).logits is not None
    remove_mini_sequence(model)  # there is nothing to remove
    assert twin(**make_batch()).logits is None


def test_removed_under_a_wrapper_that_holds_on_to_the_forward():
    model = apply_mini_sequence(make_model())
    held = model.forward
    remove_mini_sequence(model)
    assert held(**make_batch()).logits is not None


def test_the_routers_loss(warnings):
    """Beside what the mask hides, and beside a router that is not transformers' own, it is the
    model's own."""
    model = make_model("qwen3_moe", torch.float64)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    mask[1, 15:] = 0
    batch = make_batch()
    hidden = batch | {"attention_mask": mask}
    hidden["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    without = batch | {"output_router_logits": False}
    expected = [step(model, **b) for b in (without, batch)]
    of_hidden = model(**hidden).loss
    assert expected[1][0] - expected[0][0] > 0.3  # at least its coefficient
    apply_mini_sequence(model, **CHUNKS)
    assert_same(step(model, **without), expected[0])
    assert_same(step(model, **batch), expected[1])
    assert not warnings()
    torch.testing.assert_close(model(**hidden).loss, of_hidden)
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: None)
    assert_same(step(model, **batch), expected[1], 1e-14)
    told = warnings()
    assert ["attention_mask hides" in told[0], "routers and experts as" in told[1]] == [True] * 2


def test_an_expert_layer_keeps_no_intermediates():
    """But for one chunk's, whatever the length."""

    def peak(length, apply):
        model, batch = make_model("mixtral"), make_batch(1, length)
        if apply:
            apply_mini_sequence(model, **CHUNKS)
        with MemoryTracker() as tracker:
            model(**batch, use_cache=False).loss.backward()
        return tracker.peak_bytes

    growth = [peak(512, apply) - peak(256, apply) for apply in (False, True)]
    assert growth[1] < 0.1 * growth[0]


def test_random_routing_is_refused():
    model = make_model("mixtral", router_jitter_noise=0.1)
    apply_mini_sequence(model, **CHUNKS)
    with pytest.raises(RuntimeError, match="drew random numbers"):
        model(**make_batch())


# --- what is refused -----------------------------------------------------------------------------


def unsupported():
    gpt2 = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=9)
    yield transformers.GPT2LMHeadModel(gpt2), "GPT2LMHeadModel is not supported"
    yield torch.nn.Linear(2, 2), "Linear is not supported"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    shared = transformers.Qwen2MoeConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    yield transformers.Qwen2MoeForCausalLM(shared), "Qwen2MoeForCausalLM is not supported"
    yield make_model("qwen3_moe", mlp_only_layers=[0]), r"config.mlp_only_layers=\[0\] is not"
    yield make_model("olmoe", clip_qkv=3.0), "config.clip_qkv=3.0 is not supported"
    yield make_model().model, "LlamaModel is not supported"
    yield make_model(attention_dropout=0.1), "attention_dropout=0.1"
    yield make_model("phi3", resid_pdrop=0.1), "resid_pdrop=0.1"
    own = make_model()
    own.model.layers[1].mlp = torch.nn.Identity()
    yield own, "layer 1: mlp is a torch.nn.modules.linear.Identity"
    subclass = make_model()
    subclass.__class__ = type("LlamaForCausalLM", (type(subclass),), {})
    yield subclass, "LlamaForCausalLM is not supported"


@pytest.mark.parametrize("number", range(10))
def test_unsupported_models_stay_as_they_are(number):
    model, message = list(unsupported())[number]
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=message) as caught:
        apply_mini_sequence(model)
    assert len(caught.value.problems) == 1
    if "Phi3ForCausalLM" in str(caught.value):
        assert "LlamaForCausalLM" in str(caught.value)
    assert [type(module) for module in model.modules()] == kinds
    assert "_mini_sequence" not in vars(model)


def test_impossible_chunks_are_refused_before_anything_changes():
    model = make_model()
    with pytest.raises(UserError, match="chunk_tokens=0"):
        apply_mini_sequence(model, head_chunk_tokens=0)
    assert type(model) is transformers.LlamaForCausalLM


# --- memory --------------------------------------------------------------------------------------

SMALLER, SMALLER_THAN_CHECKPOINTED = 14.0, 8.0
"""How much less a step holds beyond the weights' gradients: at least so many times."""


def peak(model, batch):
    """The most bytes that a step holds beyond the weights and their gradients."""
    model.zero_grad(set_to_none=True)
    with MemoryTracker() as tracker:
        model(**batch).loss.backward()
    return tracker.peak_bytes - sum(p.grad.nbytes for p in model.parameters())


def test_a_step_holds_less():
    shapes = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 224}
    model = make_model(**shapes, num_hidden_layers=3)
    model.set_attn_implementation("sdpa")
    batch = make_batch(1, 1024)
    before = peak(model, batch)
    model.activation_checkpointing_enable()
    checkpointed = peak(model, batch)
    model.activation_checkpointing_disable()
    apply_mini_sequence(model, **dict.fromkeys(CHUNKS, 128))
    after = peak(model, batch)
    assert before / after > SMALLER
    assert checkpointed / after > SMALLER_THAN_CHECKPOINTED
    model.activation_checkpointing_enable()  # adds nothing
    assert peak(model, batch) == after


# --- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["llama", "llama, biases", "gemma2", "olmo2", "phi3"])
def test_under_autocast_as_precise_as_the_model_was(name, scheme):
    """Errors against fp32, which may not grow by more than a half."""
    model, batch = make_model(name), make_batch()
    exact = step(model, **batch)

    def errors():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        model.zero_grad(set_to_none=True)
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        gradients = [(p.grad - exact[1][n]).norm() / exact[1][n].norm() for n, p in named]
        return abs(loss - exact[0]).item(), torch.stack(gradients)

    named = list(model.named_parameters())
    loss_before, before = errors()
    apply_mini_sequence(model, **SCHEMES[scheme])
    loss_after, after = errors()
    assert loss_after <= 1.5 * loss_before + 5e-3
    assert after.mean() <= 1.5 * before.mean()
    assert 1e-4 < after.mean() < 0.1  # bf16 it was, and nothing is missing


def test_backward_inside_autocast():
    model, batch = apply_mini_sequence(make_model(), **CHUNKS), make_batch()
    gradients = []
    for inside in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# --- trainers and adapters -----------------------------------------------------------------------


class Texts(torch.utils.data.Dataset):
    """Rows of different numbers of valid tokens."""

    def __len__(self):
        return 160

    def __getitem__(self, index):
        batch = make_batch(1, LENGTH, seed=index)
        batch["labels"][:, : index % 17] = -100
        return {key: value[0] for key, value in batch.items()}


def train(model, folder, steps=6, **settings):
    """The losses of some steps of two times four sequences."""
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=Texts(), eval_dataset=Texts() if settings else None
    )
    trainer.train()
    if settings:
        trainer.evaluate()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_the_trainer_sees_the_same_losses(tmp_path):
    model = make_model()
    twin = apply_mini_sequence(copy.deepcopy(model), **CHUNKS)
    expected, losses = train(model, tmp_path, 20), train(twin, tmp_path, 20)
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.05
    assert losses == pytest.approx(expected, rel=1e-4)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
    prompt = make_batch()["input_ids"]
    generated = [m.generate(prompt, do_sample=False, max_new_tokens=5) for m in (model, twin)]
    assert torch.equal(*generated)


def test_evaluation_has_logits_where_they_are_asked_for(tmp_path):
    pytest.importorskip("accelerate")
    model, seen = make_model(), []
    twin = apply_mini_sequence(copy.deepcopy(model), evaluation_logits=True, **CHUNKS)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True
    )
    for each in (model, twin):
        trainer = transformers.Trainer(
            each, arguments, compute_metrics=lambda found: seen.append(found.predictions) or {}
        )
        trainer.evaluate([Texts()[index] for index in range(3)])
    assert seen[0].ndim == 3
    assert seen[1] == pytest.approx(seen[0], abs=1e-5)
    assert twin.train()(**make_batch()).logits is None
    assert apply_mini_sequence(twin).eval()(**make_batch()).logits is None


@pytest.mark.slow
def test_the_trainer_in_bf16_with_checkpointing_asked_for(tmp_path):
    model = make_model("gemma2")
    twin = apply_mini_sequence(copy.deepcopy(model), **CHUNKS)
    expected = train(model, tmp_path, bf16=True)
    losses = train(twin, tmp_path, bf16=True, activation_checkpointing=True)
    assert losses == pytest.approx(expected, rel=2e-2)
    remove_mini_sequence(twin)
    assert twin(**make_batch()).logits is not None


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    "targets",
    [ATTENTION, ["gate_proj", "up_proj", "down_proj"], "all-linear", ["lm_head", "v_proj"]],
    ids=["attention", "mlp", "all", "head"],
)
@pytest.mark.parametrize("scheme", ["blocks", "no recomputation"])
def test_adapters(targets, scheme):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(make_model(), lora).to(torch.float64)
    batch = make_batch()
    expected = step(model, **batch)
    assert expected[1] and all("lora" in name for name in expected[1])
    apply_mini_sequence(model, **SCHEMES[scheme])
    assert_same(step(model, **batch), expected)
    assert model(**batch).logits is None
    remove_mini_sequence(model)
    assert_same(step(model, **batch), expected, 1e-14)


def test_adapters_added_afterwards_and_trained(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=3, target_modules=[*ATTENTION, "gate_proj"], lora_alpha=64)
    models = [make_model(), apply_mini_sequence(make_model(), **CHUNKS)]
    for index, model in enumerate(models):
        torch.manual_seed(3)
        models[index] = peft.get_peft_model(model, lora)
    expected, losses = (train(model, tmp_path) for model in models)
    assert losses == pytest.approx(expected, rel=1e-4)
    models[1].save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    theirs = reloaded.get_base_model().state_dict()
    for name, tensor in models[1].get_base_model().state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_dropout_in_a_layer_that_would_run_again_is_refused():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"], lora_dropout=0.5)
    model = peft.get_peft_model(apply_mini_sequence(make_model(), **CHUNKS), lora)
    with pytest.raises(RuntimeError, match="lora_dropout=0"):
        model(**make_batch())
    model.eval()
    model(**make_batch()).loss.backward()
    apply_mini_sequence(model.train(), **CHUNKS, recompute=False)
    model(**make_batch()).loss.backward()
