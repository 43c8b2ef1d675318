"""Small models of transformers, a batch, a step in float64, and what makes two of them the same."""

import torch
import transformers
from keeps_float64 import KeepsFloat64
from torch.autograd.graph import _engine_run_backward

ROWS, LENGTH, VOCABULARY = 2, 23, 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.15,
}
MODELS = {
    "llama": ("Llama", {}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama, relu": ("Llama", {"hidden_act": "relu", "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
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
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {"sliding_window": 6}),
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "head_dim": 10,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.3,
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 3}),
    "olmoe, relu": (
        "Olmoe",
        {"num_experts": 5, "num_experts_per_tok": 2, "hidden_act": "relu"},
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "head_dim": 10,
            "sliding_window": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e3},
        },
    ),
}
CHUNKS = {"mlp_chunk_tokens": 7, "head_chunk_tokens": 11, "block_chunk_tokens": 12}
SCHEMES = {
    "blocks": CHUNKS,
    "attention again": CHUNKS | {"keep_attention": False},
    "auto": {},
    "no recomputation": CHUNKS | {"recompute": False},
}


def make_model(name="llama", dtype=torch.float32, seed=0, **others):
    """A model of transformers, every parameter at random."""
    family, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**COMMON | settings | others)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(dtype).train()
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.original_inv_freq.float()
    return model


def make_batch(rows=ROWS, length=LENGTH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (rows, length), generator=generator)
    labels = tokens.clone()
    labels[0, 4:9] = -100
    return {"input_ids": tokens, "labels": labels}


def step(model, **batch):
    """Loss, and gradients by their names."""
    model.zero_grad(set_to_none=True)
    with KeepsFloat64():
        output = model(**batch)
        loss = output.loss
        # Public functions leave the mode, and layers run again in the backward.
        _engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), accumulate_grad=True
        )
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return output.loss.detach(), {n: p.grad.clone() for n, p in parameters if p.grad is not None}


def assert_same(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=0)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in actual[1].items():
        assert (gradient - expected[1][name]).norm() <= tolerance * expected[1][name].norm(), name
