"""What models are wrapped in, in one process: before the method or after it."""

import copy

import pytest
import torch

from mst_train.errors import UserError

pytest.importorskip("transformers")

from hf_models import CHUNKS, assert_same, make_batch, make_model, step

from mst_train.integrations.huggingface import (
    apply_mini_sequence,
    remove_mini_sequence,
)
from mst_train.integrations.huggingface.head import takes_labels
from mst_train.integrations.huggingface.layers import FAMILIES, RowwiseLayer

ORDERS = pytest.mark.parametrize("order", ["before", "after"])
LAYERS = [f"model.layers.{index}" for index in range(3)]
SPREAD = dict.fromkeys(["model.embed_tokens", *LAYERS, "model.norm", "model.rotary_emb"], "cpu")


def dispatched(accelerate, model):
    return accelerate.dispatch_model(model, SPREAD | {"lm_head": "cpu"}, force_hooks=True)


def dispatched_whole(accelerate, model):
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def unhooked(accelerate, model):
    """A forward of its own is left: the class's, bound."""
    model = dispatched(accelerate, model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert "forward" in vars(model.model.layers[0])
    return model


@ORDERS
@pytest.mark.parametrize("wrap", [dispatched, dispatched_whole, unhooked])
def test_accelerates_hooks_that_align_devices(wrap, order):
    accelerate = pytest.importorskip("accelerate")
    model, batch = make_model(dtype=torch.float64), make_batch()
    expected = step(model, **batch)
    if order == "before":
        apply_mini_sequence(model, **CHUNKS)
        model = wrap(accelerate, model)
    else:
        model = wrap(accelerate, model)
        apply_mini_sequence(model, **CHUNKS)
    assert_same(step(model, **batch), expected)
    assert model(**batch).logits is None
    # Weights are used directly, as if nothing were around them: no logits, no MLP's intermediates.
    assert takes_labels(model.lm_head)
    assert RowwiseLayer(model.model.layers[0], FAMILIES[0], 7, rerun=True)._activation == "silu"
    remove_mini_sequence(model)
    assert_same(step(model, **batch), expected, 1e-14)
    assert model(**batch).logits is not None


@ORDERS
def test_accelerates_offloaded_weights(order):
    """Their gradients are lost, with the method or without; the inputs' are not."""
    accelerate = pytest.importorskip("accelerate")
    model, batch = make_model(dtype=torch.float64), make_batch()
    inputs = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    batch["inputs_embeds"] = inputs
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    step(model, **batch)
    expected, inputs.grad = inputs.grad, None
    if order == "before":
        model = accelerate.cpu_offload(apply_mini_sequence(model, **CHUNKS), torch.device("cpu"))
    else:
        model = accelerate.cpu_offload(model, torch.device("cpu"))
        apply_mini_sequence(model, **CHUNKS)
    assert model.lm_head.weight.is_meta
    step(model, **batch)
    assert model(**batch).logits is None
    torch.testing.assert_close(inputs.grad, expected, rtol=1e-9, atol=1e-12)


def test_accelerates_offloading_is_refused_where_it_cannot_be_honoured():
    accelerate = pytest.importorskip("accelerate")
    model, batch = make_model(), make_batch()
    accelerate.cpu_offload(apply_mini_sequence(model, **CHUNKS), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="layer 0: weights that want gradients are offloaded"):
        model(**batch)
    whole = make_model().requires_grad_(False)
    expected = whole(**batch).loss
    apply_mini_sequence(whole, **CHUNKS)
    accelerate.hooks.attach_align_device_hook(
        whole,
        execution_device="cpu",
        offload=True,
        weights_map=whole.state_dict(),
        preload_module_classes=["LlamaDecoderLayer"],
    )
    with pytest.raises(RuntimeError, match="layer 0: Accelerate takes the layer's weights away"):
        whole(**batch)
    with torch.no_grad():
        torch.testing.assert_close(whole(**batch).loss, expected)
    attention = make_model()
    accelerate.hooks.add_hook_to_module(
        attention.model.layers[1].self_attn,
        accelerate.hooks.AlignDevicesHook("cpu", offload=True, place_submodules=True),
    )
    with pytest.raises(UserError, match=r"layer 1: self_attn has a forward of its own \(acceler"):
        apply_mini_sequence(attention)


@pytest.fixture
def accelerate_anew():
    """Its settings are the process's, which other tests have made."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerator_prepare(accelerate_anew):
    accelerate = accelerate_anew
    model, batch = make_model(), make_batch()
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(copy.deepcopy(model))
    expected = prepared(**batch).loss
    with pytest.raises(UserError, match=r"the model has a forward of its own \(accelerate"):
        apply_mini_sequence(prepared)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    for plain in (model, unwrapped):
        prepared = accelerator.prepare(apply_mini_sequence(plain, **CHUNKS))
        output = prepared(**batch)
        assert output.logits is None
        torch.testing.assert_close(output.loss, expected, rtol=2e-2, atol=0)
    # Its forward holds on to the method's, which is taken off and put on again.
    remove_mini_sequence(prepared)
    assert prepared(**batch).logits is not None
    assert apply_mini_sequence(prepared, **CHUNKS)(**batch).logits is None


def test_checkpoint_wrappers():
    """As Accelerate's fsdp_activation_checkpointing has them: the layers run a third time."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model, batch = make_model(dtype=torch.float64), make_batch()
    twin = copy.deepcopy(model)
    expected = step(model, **batch)
    apply_mini_sequence(model, **CHUNKS)
    for each in (model, twin):
        apply_activation_checkpointing(each, check_fn=lambda m: isinstance(m, LlamaDecoderLayer))
    loss, gradients = step(model, **batch)
    names = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients.items()}
    assert_same((loss, names), expected)
    with pytest.raises(UserError, match=r"layer 0, 1, 2: it is a torch\..*CheckpointWrapper"):
        apply_mini_sequence(twin)


@pytest.mark.parametrize("recompute", [True, False])
def test_transformers_own_checkpointing(recompute):
    model, batch = make_model(dtype=torch.float64), make_batch()
    expected = step(model, **batch)
    model.activation_checkpointing_enable()
    apply_mini_sequence(model, **CHUNKS, recompute=recompute)
    assert_same(step(model, **batch), expected)


# --- bitsandbytes --------------------------------------------------------------------------------

BITS = pytest.mark.parametrize("bits", [4, 8])


def quantized(bits):
    """A model with adapters on weights that are packed, or are integers with scales."""
    bnb, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    model = make_model(hidden_size=64, intermediate_size=128).requires_grad_(False)
    for name, module in list(model.model.layers.named_modules()):
        if type(module) is torch.nn.Linear:
            shape, weight = (module.in_features, module.out_features), module.weight.data
            if bits == 4:
                new = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.float32)
                new.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=new)
            else:
                new = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            parent, _, last = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), last, new)
    model.to("cpu")
    assert model.model.layers[0].mlp.up_proj.weight.dtype in (torch.uint8, torch.int8)

    def adapt(model):
        torch.manual_seed(0)
        targets = ["q_proj", "up_proj"]
        lora = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(model, lora)

    return model, adapt


@BITS
@ORDERS
def test_adapters_on_quantized_weights(bits, order):
    """In fp32, which is what they are computed in."""
    model, adapt = quantized(bits)
    twin, adapt_twin = quantized(bits)
    expected = step(adapt(model), **make_batch())
    if order == "before":
        twin = adapt_twin(apply_mini_sequence(twin, **CHUNKS))
    else:
        twin = apply_mini_sequence(adapt_twin(twin), **CHUNKS)
    assert_same(step(twin, **make_batch()), expected, 1e-5)
    assert twin(**make_batch()).logits is None
