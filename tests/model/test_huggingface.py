"""Against transformers: its models' logits, losses, gradients, files and generated tokens."""

import contextlib
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from keeps_float64 import KeepsFloat64
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mst_train.attention import select_attention
from mst_train.config import ModelConfig, RopeScalingConfig
from mst_train.errors import TrainingError, UserError
from mst_train.model import Policy, build_model
from mst_train.model.hf import weights as huggingface
from mst_train.model.hf.config import read_config, write_config
from mst_train.model.hf.families import FAMILIES
from mst_train.model.hf.names import places_by_name
from mst_train.model.hf.weights import (
    load_pretrained,
    load_weights,
    pretrained_config,
    save_pretrained,
)
from mst_train.model.rope import rotary_angles

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
ROWS, LENGTH = 2, 23
COMMON = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.15,  # so that every part of the model makes a difference
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 16.0,
    "beta_slow": 0.5,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": ("Llama", {}),
    "llama, tied and stretched": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE, "head_dim": 10},
    ),
    "llama, one key-value head": ("Llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral, no window": ("Mistral", {"sliding_window": None, "head_dim": 14}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
    "qwen2, tied, windows above": (
        "Qwen2",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "qwen3, tied, yarn": (
        "Qwen3",
        {"head_dim": 12, "tie_word_embeddings": True, "rope_parameters": YARN},
    ),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 10,
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma2, untied, uncapped": (
        "Gemma2",
        {
            "head_dim": 6,
            "sliding_window": 7,
            "tie_word_embeddings": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "olmo2": ("Olmo2", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral, every expert, a window": (
        "Mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 6, "head_dim": 10},
    ),
    "qwen3 moe": (
        "Qwen3Moe",
        {
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 13,
            "intermediate_size": 39,
            "norm_topk_prob": True,
            "head_dim": 10,
        },
    ),
    "qwen3 moe, not normalized": (
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 9,
            "intermediate_size": 18,
            "use_sliding_window": True,
            "sliding_window": 5,
            "head_dim": 6,
            "tie_word_embeddings": True,
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 4, "intermediate_size": 11}),
    "olmoe, one expert each": ("Olmoe", {"num_experts": 3, "num_experts_per_tok": 1}),
    "gpt-oss": (
        "GptOss",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "intermediate_size": 14,
            "head_dim": 10,
            "sliding_window": 5,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "gpt-oss, not stretched": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 6,
            "layer_types": ["full_attention"] * 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e3},
        },
    ),
}
POWERS_OF_TWO = {"num_hidden_layers": 4, "num_experts": 8}
POLICIES = {
    "vanilla": Policy(),
    "recompute": Policy(recompute=True),
    "mst": Policy(True, True, 7, 11, block_chunk_tokens=18),
    "mst, attention again": Policy(True, True, 1000, 5, {}, 8),
    "mst, whole blocks": Policy(True, True, 13, 1000, block_chunk_tokens=1000),
}


def model_type_of(name):
    return getattr(transformers, f"{MODELS[name][0]}Config").model_type


def make_theirs(name, dtype=torch.float64, seed=0, **others):
    """transformers' model of this name, every parameter at random."""
    family, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**COMMON | settings | others)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(
                ("mlp.gate.weight", "mlp.router.weight")
            ):  # far from even, so that some experts are rare
                parameter.mul_(3)
            if "mlp.experts" in name and parameter.ndim == 3 and family == "GptOss":
                parameter.mul_(20)  # until it clips
            if parameter.ndim == 1:  # norms and biases, which start at one number
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(dtype)
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.original_inv_freq.float()
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name): a checkpoint of this model as transformers writes it, in fp64."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("theirs")
            make_theirs(name).save_pretrained(made[name], max_shard_size="60KB")
        return made[name]

    return make


def make_batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(COMMON["vocab_size"], (ROWS, LENGTH), generator=generator)
    labels = tokens.clone()
    labels[0, 4:9] = -100
    return tokens, labels


def shifted(labels):
    """Labels as this project has them: of the token that follows."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def their_step(model, tokens, labels):
    """Loss, logits, gradients by their names."""
    with KeepsFloat64():
        output = model(tokens, labels=labels)
        output.loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients |= as_stored(name, parameter.grad, model.config.model_type)
    return output.loss.detach(), output.logits.detach(), gradients


def as_stored(name, tensor, model_type):
    """What transformers has of all experts in one tensor, as its checkpoints have it."""
    prefix, experts, kind = name.rpartition(".experts.")
    if model_type == "gpt_oss":
        return {name: tensor}
    if not experts:
        gate = model_type == "mixtral" and name.endswith(".mlp.gate.weight")
        return {name.replace(".mlp.", ".block_sparse_moe.") if gate else name: tensor}
    kinds, parts = ["down_proj"], [tensor]
    if kind == "gate_up_proj":
        kinds, parts = ["gate_proj", "up_proj"], tensor.chunk(2, dim=1)
    if model_type == "mixtral":
        prefix = prefix.replace(".mlp", ".block_sparse_moe")
        kinds = [{"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[kind] for kind in kinds]
    return {
        f"{prefix}.experts.{number}.{kind}.weight": expert
        for kind, part in zip(kinds, parts, strict=True)
        for number, expert in enumerate(part)
    }


def our_step(model, tokens, labels, name):
    loss_sum, valid = model(tokens, shifted(labels))
    (loss_sum / valid).backward()
    gradients = {}
    for key, place in places_by_name(model, model_type_of(name)):
        gradients[key] = place.stored(lambda parameter: parameter.grad)
    return (loss_sum / valid).detach(), model.logits(tokens).detach(), gradients


# --- what they compute ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected():
    """expected(name): transformers' loss, logits and gradients, in fp64."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = their_step(make_theirs(name), *make_batch())
        return made[name]

    return make


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients(name, policy, folders, expected):
    model = load_pretrained(folders(name), dtype=torch.float64, device=CPU, policy=POLICIES[policy])
    loss, logits, gradients = our_step(model, *make_batch(), name)
    expected_loss, expected_logits, expected_gradients = expected(name)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-10, atol=1e-12)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[key], rtol=1e-10, atol=1e-12, msg=key
        )


@pytest.mark.parametrize("name", MODELS)
def test_in_fp32(name, folders):
    model = load_pretrained(folders(name), dtype=torch.float32, device=CPU, policy=POLICIES["mst"])
    loss, logits, gradients = our_step(model, *make_batch(), name)
    expected = their_step(make_theirs(name, torch.float32), *make_batch())
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(logits, expected[1], rtol=1e-5, atol=1e-5)
    for key, gradient in gradients.items():
        assert (gradient - expected[2][key]).norm() <= 1e-5 * expected[2][key].norm(), key


@pytest.mark.parametrize("name", MODELS)
def test_every_setting_makes_a_difference(name, folders):
    """Equality above means something: each setting that is not Llama's is felt."""
    tokens, _ = make_batch()
    config = pretrained_config(folders(name))
    plain = ModelConfig()
    felt = (
        "sliding_window",
        "attention_scale",
        "attention_softcap",
        "logit_softcap",
        "rope_scaling",
        "scale_embeddings",
        "norm_offset",
        "normalize_experts",
        "activation",
    )
    with torch.no_grad():
        logits = load_pretrained(folders(name), dtype=torch.float64, device=CPU).logits(tokens)
        for setting in felt:
            if getattr(config, setting) == getattr(plain, setting):
                continue
            changed = dataclasses.replace(config, **{setting: getattr(plain, setting)})
            other = load_pretrained(folders(name), dtype=torch.float64, device=CPU, config=changed)
            assert (other.logits(tokens) - logits).abs().max() > 1e-4, setting


# --- files ---------------------------------------------------------------------------------------


def stored(folder):
    """The bytes of every tensor of a checkpoint."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in tensors.items()}


@pytest.mark.parametrize("name", MODELS)
def test_read_and_written_again_is_the_same(name, folders, tmp_path):
    model = load_pretrained(folders(name), dtype=torch.float64, device=CPU)
    save_pretrained(model, tmp_path / "ours", model_type=model_type_of(name))
    assert stored(tmp_path / "ours") == stored(folders(name))
    ours, theirs = (
        transformers.AutoConfig.from_pretrained(folder).to_dict()
        for folder in (tmp_path / "ours", folders(name))
    )
    for settings in (ours, theirs):  # the two say in different words that there is no window
        if not settings.get("use_sliding_window", True):
            settings["max_window_layers"] = None
    different = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
    assert different <= {"head_dim", "_name_or_path"}
    assert pretrained_config(tmp_path / "ours") == model.config


@pytest.mark.parametrize("name", MODELS)
def test_transformers_generates_the_same_from_what_is_written(name, tmp_path):
    family, settings = MODELS[name]
    theirs = getattr(transformers, f"{family}Config")(**COMMON | settings)
    config = dataclasses.replace(read_config(theirs.to_dict(), "config"), initializer_std=0.3)
    model = build_model(config, attention=select_attention("auto", CPU, torch.float32), seed=4)
    save_pretrained(model, tmp_path / "model", shard_bytes=20_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype="auto", experts_implementation="eager"
    )
    assert {p.dtype for p in reloaded.parameters()} == {torch.float32}
    tokens, _ = make_batch()
    generated = reloaded.generate(tokens, do_sample=False, max_new_tokens=20)
    with torch.no_grad():
        for _ in range(20):
            following = model.logits(tokens)[:, -1].argmax(-1)
            tokens = torch.cat([tokens, following[:, None]], 1)
    assert torch.equal(tokens, generated)
    assert len(set(tokens[:, LENGTH:].flatten().tolist())) > 2


def test_one_file_or_several(folders, tmp_path):
    model = load_pretrained(folders("llama"), dtype=torch.float64, device=CPU)
    save_pretrained(model, tmp_path / "one")
    save_pretrained(model, tmp_path / "several", shard_bytes=1)
    names = {p.name for p in (tmp_path / "one").iterdir()}
    assert names == {"config.json", "model.safetensors"}
    several = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(several) == len(dict(model.named_parameters()))
    assert several[0].name == f"model-00001-of-{len(several):05d}.safetensors"
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert stored(tmp_path / "one") == stored(tmp_path / "several")
    for folder in ("one", "several"):
        again = load_pretrained(tmp_path / folder, dtype=torch.float64, device=CPU)
        for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_types_are_converted_tensor_by_tensor(folders):
    tensors = load_pretrained(folders("llama"), dtype=torch.float64, device=CPU).state_dict()
    converted = load_pretrained(folders("llama"), dtype=torch.bfloat16, device=CPU).state_dict()
    for name, tensor in converted.items():
        assert torch.equal(tensor, tensors[name].to(torch.bfloat16)), name


def test_one_file_is_open_at_a_time(folders, monkeypatch):
    opened, at_once = [0], []

    class Counted:
        def __init__(self, *arguments, **options):
            self._file = safe_open(*arguments, **options)

        def __enter__(self):
            opened[0] += 1
            at_once.append(opened[0])
            return self._file.__enter__()

        def __exit__(self, *error):
            opened[0] -= 1
            return self._file.__exit__(*error)

    monkeypatch.setattr(huggingface, "safe_open", Counted)
    load_pretrained(folders("llama"), dtype=torch.float32, device=CPU)
    assert len(at_once) > 4
    assert set(at_once) == {1}


def test_weights_into_a_model_that_is_there(folders):
    config = pretrained_config(folders("qwen2"))
    model = build_model(config, policy=POLICIES["mst"], seed=7)
    load_weights(model, folders("qwen2"))
    expected = load_pretrained(folders("qwen2"), dtype=torch.float32, device=CPU).state_dict()
    assert all(torch.equal(p, expected[name]) for name, p in model.state_dict().items())


def test_tokenizer_and_token_ids_go_along(folders, tmp_path):
    model = load_pretrained(folders("llama"), dtype=torch.float32, device=CPU)
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("not the tokenizer's")
    (source / "config.json").write_text('{"bos_token_id": 5, "eos_token_id": [6, 7]}')
    save_pretrained(model, tmp_path / "a", tokenizer=source)
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "a" / "README.md").exists()
    values = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (5, [6, 7])
    assert values["pad_token_id"] is None
    (source / "words.model").write_bytes(b"pieces")
    save_pretrained(
        model, tmp_path / "b", tokenizer=source / "words.model", token_ids={"eos_token_id": 2}
    )
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == b"pieces"
    assert json.loads((tmp_path / "b" / "config.json").read_text())["eos_token_id"] == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no tokenizer"):
        save_pretrained(model, tmp_path / "c", tokenizer=tmp_path / "empty")


def test_from_the_hub(folders, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folders("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load_pretrained("someone/llama", dtype=torch.float32, device=CPU)
    name, patterns = asked[0]
    assert name == "someone/llama"
    assert not any("bin" in pattern or "pt" in pattern.split(".") for pattern in patterns)

    def offline(name, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"the Hugging Face Hub does not give it: no network$"):
        load_pretrained("someone/llama", dtype=torch.float32, device=CPU)
    for name in ("nowhere", "/nowhere/at/all", "./nowhere"):
        with pytest.raises(UserError, match=r"there is no folder .*: give a checkpoint's folder"):
            load_pretrained(name, dtype=torch.float32, device=CPU)


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def broken(folders, tmp_path):
    """broken(name, tensors=..., **values): a copy of a checkpoint with other contents."""

    def make(name="llama", tensors=None, **values):
        folder = tmp_path / "broken"
        folder.mkdir()
        config = json.loads((folders(name) / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))
        contents = {}
        for file in folders(name).glob("*.safetensors"):
            contents |= load_file(file)
        contents |= tensors or {}
        kept = {key: tensor for key, tensor in contents.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors")
        return folder

    return make


def refusal(folder, **options):
    with pytest.raises(UserError) as error:
        load_pretrained(folder, dtype=torch.float32, device=CPU, **options)
    return error.value.problems


def test_every_wrong_tensor_is_listed(broken):
    folder = broken(
        tensors={
            "model.norm.weight": None,
            "model.layers.1.mlp.up_proj.weight": torch.zeros(40, 25),
            "model.layers.3.mlp.up_proj.weight": torch.zeros(40, 24),
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(24),
            "lm_head.weight": torch.zeros(61, 24, dtype=torch.int8),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3),  # of old checkpoints
        }
    )
    assert refusal(folder) == [
        f"{folder}: model.layers.1.mlp.up_proj.weight has the shape [40, 25], and the model "
        f"[40, 24]",
        f"{folder}: model.norm.weight is missing",
        f"{folder}: lm_head.weight is of type I8: only floating point is read",
        f"{folder}: model.layers.0.self_attn.q_proj.bias is not a tensor of such a model",
        f"{folder}: model.layers.3.mlp.up_proj.weight is not a tensor of such a model",
    ]


def test_a_model_that_is_there_is_left_alone(broken, folders):
    model = load_pretrained(folders("llama"), dtype=torch.float64, device=CPU)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(UserError):
        load_weights(model, broken(tensors={"model.norm.weight": None}))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_tied_head_must_be_the_embedding(broken, folders, tmp_path):
    name = "llama, tied and stretched"
    embedding = load_file(sorted(folders(name).glob("*.safetensors"))[0])[
        "model.embed_tokens.weight"
    ]
    folder = broken(name, {"lm_head.weight": embedding + 1})
    assert "lm_head.weight is not model.embed_tokens.weight" in refusal(folder)[0]
    (folder / "model.safetensors").unlink()
    contents = {}
    for file in folders(name).glob("*.safetensors"):
        contents |= load_file(file)
    save_file(contents | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    load_pretrained(folder, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("llama", {"model_type": "bert"}, "model_type=bert is not supported: it must be one of"),
        ("llama", {"model_type": None}, "model_type=None is not supported"),
        ("llama", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True is not supported"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported"),
        ("mixtral", {"num_local_experts": 0}, "an impossible model: model.num_experts=0 must be"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts=None is not supported"),
        ("mixtral", {"num_experts": 9}, "num_experts=9 is not supported: num_local_experts=5 says"),
        ("mixtral", {"num_experts_per_tok": 6}, "model.experts_per_token=6 is more than"),
        ("qwen3 moe", {"mlp_only_layers": [0]}, "mlp_only_layers=[0] is not supported: it must be"),
        ("qwen3 moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
        ("qwen3 moe", {"moe_intermediate_size": 1.5}, "moe_intermediate_size=1.5 is not supported"),
        ("qwen3 moe", {"output_router_logits": True, "router_aux_loss_coef": -1},
         "router_aux_loss_coef=-1 is not supported: it must be a number"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported: it must be null or left out"),
        ("olmoe", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("olmoe", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not"),
        (
            "gpt-oss",
            {"quantization_config": {"quant_method": "mxfp4"}},
            "it must be null or left out: write the weights in bf16 by transformers first (of "
            "mxfp4: quantization_config=Mxfp4Config(dequantize=True))",
        ),
        ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit=5.0 is not supported"),
        ("gpt-oss", {"attention_bias": False}, "attention_bias=False is not supported"),
        ("llama", {"model_type": "qwen2_moe"}, "model_type=qwen2_moe is not supported"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ("llama", {"hidden_act": "relu"}, "hidden_act=relu is not supported: it must be one of"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not"),
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, "architectures=['Llama"),
        ("llama", {"hidden_size": "24"}, "hidden_size=24 is not supported: it must be a whole"),
        ("llama", {"vocab_size": 2**62}, "vocab_size=4611686018427387904 is not supported"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is not supported"),
        ("llama", {"architectures": True}, "architectures=True is not supported"),
        ("llama", {"rope_scaling": [1]}, "rope_scaling=[1] is not supported: it must be an object"),
        ("qwen2", {"layer_types": 3, "use_sliding_window": True, "sliding_window": 4},
         "layer_types=3 is not supported"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps=0 is not supported: it must be a number"),
        ("llama", {"num_key_value_heads": 3}, "describes an impossible model: model.num_heads=4"),
        ("qwen2", {"layer_types": ["chunked"] * 3, "use_sliding_window": True,
                   "sliding_window": 4}, "layer_types="),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
         "rope_scaling: rope_type=dynamic is not supported"),
        ("llama", {"rope_scaling": {"type": "longrope"}}, "rope_scaling: rope_type=longrope"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor=None is not"),
        ("llama", {"rope_scaling": YARN | {"mscale": 1.0}}, "rope_scaling: mscale=1.0"),
        ("llama", {"rope_scaling": YARN | {"truncate": "no"}}, "rope_scaling: truncate=no"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
         "rope_parameters that differ between layers"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(broken, name, values, message):
    folder = broken(name, **values)
    problems = refusal(folder)
    assert len(problems) == 1
    assert problems[0].startswith(f"{folder / 'config.json'}")
    assert message in problems[0]


def test_every_problem_of_a_configuration_is_listed(broken):
    assert len(refusal(broken(mlp_bias=True, hidden_act="relu", vocab_size=None))) == 3


@pytest.mark.parametrize(
    ("file", "contents", "message"),
    [
        ("config.json", "{", "cannot read .*config.json"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("config.json", "[" * 100_000, "cannot read .*config.json"),
        ("model.safetensors", "nonsense", "cannot read .*model.safetensors"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}', "does not name files"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b"}}', "cannot read .*b"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "\\ud800"}}', "cannot read "),
    ],
)
def test_files_that_cannot_be_read(broken, file, contents, message):
    folder = broken()
    (folder / file).write_text(contents)
    with pytest.raises(UserError, match=message):
        load_pretrained(folder, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "it is not there: weights are read from model.safetensors, or from what "),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"nonsense", "it is not whole, or not safetensors"),
    ],
)
def test_a_file_without_weights_is_all_that_is_told(broken, contents, message):
    """Not each tensor that would be in it as well."""
    folder = broken()
    (folder / "model.safetensors").unlink()
    if contents is not None:
        (folder / "model.safetensors").write_bytes(contents)
    (problem,) = refusal(folder)
    assert problem.startswith(f"cannot read {folder / 'model.safetensors'}: ")
    assert message in problem


def test_an_index_that_is_wrong(folders, tmp_path):
    model = load_pretrained(folders("llama"), dtype=torch.float32, device=CPU)
    save_pretrained(model, tmp_path / "model", shard_bytes=20_000)
    path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    wrong = max(index["weight_map"].values())
    index["weight_map"]["model.embed_tokens.weight"] = wrong
    path.write_text(json.dumps(index))
    assert refusal(tmp_path / "model") == [
        f"{tmp_path / 'model' / wrong}: model.embed_tokens.weight is not in it, and "
        f"model.safetensors.index.json says so"
    ]


def test_nothing_is_written_over_or_left_half(folders, tmp_path, monkeypatch):
    model = load_pretrained(folders("llama"), dtype=torch.float32, device=CPU)
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already: name a new folder, or empty it"):
        save_pretrained(model, used)
    (tmp_path / "empty").mkdir()
    save_pretrained(model, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "save_file", full)
    with pytest.raises(TrainingError, match=r"cannot write .*new: .*No space left on device"):
        save_pretrained(model, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "used"]


def test_models_that_no_family_has():
    config = ModelConfig(qkv_bias=True, norm_offset=True, max_positions=8)
    with pytest.raises(UserError) as error:
        write_config(config)
    assert len(error.value.problems) == len(FAMILIES)
    assert error.value.problems[2] == "a qwen2 model cannot have model.norm_offset=True"
    with pytest.raises(UserError, match=r"a llama model cannot have model\.qkv_bias=True"):
        write_config(dataclasses.replace(config, norm_offset=False), "llama")
    with pytest.raises(UserError, match="model_type=gpt2 is not supported"):
        write_config(config, "gpt2")
    with pytest.raises(UserError, match=r"set model\.max_positions"):
        write_config(ModelConfig())
    assert write_config(ModelConfig(), sequence_length=9)["max_position_embeddings"] == 9


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"head_size": 10, "num_heads": 6}, "mistral"),  # Llama's class wants whole heads
        ({"sliding_window": 8}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, "sliding_window": 8}, "qwen2"),
        ({"qk_norm": "head"}, "qwen3"),
        ({"qk_norm": "projection", "norm_placement": "after"}, "olmo2"),
        ({"num_experts": 4}, "mixtral"),
        ({"num_experts": 4, "balance_loss": 0.02}, "mixtral"),
        ({"num_experts": 4, "experts_per_token": 3, "qk_norm": "head"}, "qwen3_moe"),
        ({"num_experts": 4, "qk_norm": "head", "normalize_experts": False}, "qwen3_moe"),
        ({"num_experts": 4, "qk_norm": "head", "sliding_window": 8}, "qwen3_moe"),
        ({"num_experts": 4, "qk_norm": "projection", "balance_loss": 0.1}, "olmoe"),
        ({"num_experts": 4, "qk_norm": "projection", "head_size": 10}, None),
        ({"num_experts": 4, "normalize_experts": False}, None),
        ({"sliding_window": 8, "sliding_window_pattern": ["full", "sliding"]}, None),
        ({"attention_scale": 0.5}, None),
        ({"attention_scale": 64**-0.5}, "llama"),
        ({"attention_softcap": 9.0}, None),
        ({"attention_sinks": True}, None),
        ({"qkv_bias": True, "output_bias": True}, None),
    ],
)
def test_the_family_is_found_by_the_settings(changes, family):
    config = ModelConfig(max_positions=8, **changes)
    if family is None:
        with pytest.raises(UserError):
            write_config(config)
        return
    values = write_config(config)
    assert values["model_type"] == family
    again = read_config(values, "config")
    assert again == dataclasses.replace(config, attention_scale=None)


def test_every_presets_configuration_survives_the_way_out_and_back():
    from mst_train.cli.compose import compose
    from mst_train.cli.config_folders import choices

    families = set()
    for preset in choices("model"):
        config = compose([f"model={preset}"]).model
        values = write_config(config, sequence_length=config.max_positions or 4096)
        families.add(values["model_type"])
        again = read_config(values, "config")
        assert again.head_dim == config.head_dim
        expected = dataclasses.replace(
            config,
            head_size=again.head_size,
            max_positions=again.max_positions,
            router_z_loss=0.0,  # which transformers knows nothing of
        )
        assert again == expected, preset
        theirs = transformers.AutoConfig.for_model(**values)
        assert read_config(theirs.to_dict(), "config") == again, preset
    assert families == set(FAMILIES)


def test_the_balance_loss_is_transformers_where_it_adds_it(tmp_path):
    """It does where it gives out the routers' logits, and not otherwise."""
    tokens, labels = make_batch()
    for coefficient in (0.0, 0.25):
        config = ModelConfig(
            vocab_size=61, num_layers=1, num_experts=4, balance_loss=coefficient, max_positions=64
        )
        save_pretrained(build_model(config), tmp_path / str(coefficient))
        assert pretrained_config(tmp_path / str(coefficient)) == config
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / str(coefficient), experts_implementation="eager"
        )
        plain = theirs(tokens, labels=labels, output_router_logits=False).loss
        added = theirs(tokens, labels=labels).loss - plain
        balance = theirs(tokens, output_router_logits=True).aux_loss
        torch.testing.assert_close(added, coefficient * balance, rtol=1e-5, atol=1e-6)
    values = json.loads((tmp_path / "0.25" / "config.json").read_text())
    without = read_config(values | {"router_aux_loss_coef": 0}, "config")
    assert without.balance_loss == 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe", "olmoe"])
def test_gradients_with_the_balance_loss(name, policy, tmp_path):
    """transformers divides by the number of rows in fp32: of a power of two, which is exact."""
    model = make_theirs(name, output_router_logits=True, router_aux_loss_coef=0.5, **POWERS_OF_TWO)
    model.save_pretrained(tmp_path)
    tokens, labels = (t[:, :16] for t in make_batch())
    expected = their_step(model, tokens, labels)
    ours = load_pretrained(tmp_path, dtype=torch.float64, device=CPU, policy=POLICIES[policy])
    loss, _, gradients = our_step(ours, tokens, labels, name)
    plain = load_pretrained(
        tmp_path,
        dtype=torch.float64,
        device=CPU,
        config=dataclasses.replace(ours.config, balance_loss=0.0),
    )
    assert loss > our_step(plain, tokens, labels, name)[0] + 0.5
    torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=0)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[2][key], rtol=1e-10, atol=1e-12, msg=key)


def test_how_many_experts_there_are_has_two_keys():
    values = write_config(ModelConfig(num_experts=4, qk_norm="head", max_positions=64))
    assert values["num_experts"] == 4
    del values["num_experts"]
    assert read_config(values, "config").num_experts == 128  # what transformers takes
    assert read_config(values | {"num_local_experts": 3}, "config").num_experts == 3


def test_a_checkpoint_of_other_experts_is_refused_briefly(folders):
    config = dataclasses.replace(pretrained_config(folders("mixtral")), num_experts=60)
    with pytest.raises(UserError) as error:
        load_weights(build_model(config), folders("mixtral"))
    *problems, last = error.value.problems
    assert len(problems) == 50
    assert problems[0].endswith("model.layers.0.block_sparse_moe.experts.5.w1.weight is missing")
    assert last.endswith(f"and {3 * (1 + 3 * 55) - 50} more tensors that are wrong")


def test_all_experts_in_one_tensor_are_told(tmp_path):
    make_theirs("qwen3 moe").save_pretrained(tmp_path, save_original_format=False)
    (problem,) = refusal(tmp_path)
    assert "_proj has the weights of all experts" in problem
    assert "write it with save_original_format=True" in problem


def test_experts_in_several_files_are_gathered_once_for_each(folders):
    """As stage 3 has it, where a parameter is whole in a context alone."""
    found = huggingface.find_weights(pretrained_config(folders("mixtral")), folders("mixtral"))
    assert len(found.files) > 3
    model = build_model(pretrained_config(folders("mixtral")), seed=1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    entered = []

    @contextlib.contextmanager
    def whole(parameter):
        entered.append(names[parameter])
        yield

    huggingface.copy_weights(found, model, whole)
    expected = load_pretrained(folders("mixtral"), dtype=torch.float32, device=CPU).state_dict()
    assert all(torch.equal(p, expected[name]) for name, p in model.state_dict().items())
    assert len(names) <= len(entered) <= len(names) + 9 * len(found.files)
    assert max(entered.count(name) for name in entered) <= len(found.files)


# --- rotary embeddings ---------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [torch.arange(64), torch.randint(10_000, (2, 50))])
@pytest.mark.parametrize("head_size", [6, 64])
@pytest.mark.parametrize(
    "scaling",
    [
        RopeScalingConfig(),
        RopeScalingConfig("linear", 3.0),
        RopeScalingConfig("ntk", 4.0),
        RopeScalingConfig("llama3", 8.0, 512),
        RopeScalingConfig("llama3", 32.0, 64, low_frequency_factor=2.0, high_frequency_factor=9.0),
        RopeScalingConfig("yarn", 4.0, 512),
        RopeScalingConfig("yarn", 1.0, 512),
        RopeScalingConfig("yarn", 16.0, 64, beta_fast=5.0, beta_slow=0.5, attention_factor=1.3),
        RopeScalingConfig("yarn", 32.0, 4096, truncate=False),
        RopeScalingConfig("yarn", 4.0, 4),  # no feature turns often enough to be kept
    ],
    ids=str,
)
def test_angles_are_transformers_to_the_last_bit(scaling, head_size, positions):
    config = ModelConfig(
        head_size=head_size, rope_theta=7000.0, rope_scaling=scaling, max_positions=64
    )
    values = write_config(config)
    theirs = transformers.AutoConfig.for_model(**values)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    batched = positions if positions.ndim == 2 else positions[None]
    expected = [t[..., : head_size // 2] for t in rotary(torch.empty(0), batched)]
    actual = rotary_angles(batched, config, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert [t.dtype for t in rotary_angles(positions, config, torch.float64)] == [torch.float64] * 2


def test_static_ntk_slows_the_slowest_frequency_by_the_factor_and_keeps_the_fastest():
    plain = ModelConfig(head_size=32)
    stretched = dataclasses.replace(plain, rope_scaling=RopeScalingConfig("ntk", 8.0))
    one = torch.tensor([1])
    slow, fast = (
        torch.atan2(*reversed(rotary_angles(one, config, torch.float64)))[0, [-1, 0]]
        for config in (plain, stretched)
    )
    assert (slow[0] / fast[0]).item() == pytest.approx(8.0, rel=1e-5)
    assert (slow[1] / fast[1]).item() == 1.0


def test_dynamic_scaling_at_a_length_is_a_static_one():
    """What transformers calls dynamic is ntk with a factor that depends on the length."""
    factor, longest, length = 2.0, 64, 192
    theirs = transformers.LlamaConfig(
        max_position_embeddings=longest,
        rope_parameters={"rope_type": "dynamic", "factor": factor, "rope_theta": 1e4},
    )
    dynamic = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["dynamic"]
    frequencies, _ = dynamic(theirs, CPU, seq_len=length)
    static = factor * length / longest - (factor - 1)
    config = ModelConfig(head_size=128, rope_scaling=RopeScalingConfig("ntk", static))
    angle = torch.atan2(*reversed(rotary_angles(torch.tensor([1]), config, torch.float64)))[0]
    torch.testing.assert_close(angle, frequencies.double(), rtol=1e-5, atol=1e-9)
    assert math.isclose(static, 5.0)
