"""The families of models whose Hugging Face checkpoints are read and written.

``FAMILIES`` is the whole of what is supported: for each ``model_type``, what every model of the
family has, and what its config.json can say.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Activations by transformers' names."""

SPANS = {"sliding_attention": "sliding", "full_attention": "full"}

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
"""What every config.json states, and the settings' names of it."""

NEVER = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "use_bidirectional_attention": False,
    "quantization_config": None,
}
"""Keys that only these values (or null) are supported of."""

PLAIN = {"output_bias": False, "attention_sinks": False, "expert_bias": False}
"""What gpt-oss alone has."""

LLAMA = {
    **PLAIN,
    "qkv_bias": False,
    "qk_norm": "none",
    "attention_softcap": None,
    "logit_softcap": None,
    "norm_placement": "before",
    "norm_offset": False,
    "scale_embeddings": False,
}


@dataclass(frozen=True)
class ExpertNames:
    """What a family's checkpoints call mixtures of experts.

    module: a layer's mixture. router: in it. matrices: each expert's, by this project's names.
    together: those of all experts are one tensor, and gate and up are one.
    count, size, normalized: config.json's keys of how many there are, of the features in each, and
        of whether the chosen ones' weights are divided by their sum; None: they always are.
    """

    module: str
    matrices: Mapping[str, str]
    count: str = "num_experts"
    size: str = "intermediate_size"
    normalized: str | None = "norm_topk_prob"
    router: str = "gate"
    together: bool = False


_PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
PER_EXPERT = ExpertNames("mlp", _PROJECTIONS)
COUNTS = ("num_experts", "num_local_experts")
"""How many experts there are: transformers takes either key for every family, and 5 writes the
second where others want the first."""


@dataclass(frozen=True)
class Family:
    """A family of models.

    architecture: its class in transformers.
    fixed: settings that all of its models share.
    defaults: what transformers takes where config.json leaves a key out.
    windows: which layers may have sliding windows: none, all of them, or those of ``layer_types``.
    capped: config.json has query_pre_attn_scalar and the two softcaps.
    even_heads: transformers wants a hidden size that is a multiple of the number of heads.
    whole_heads: it wants heads that have the hidden size's features together.
    experts: None: MLPs alone. never: as ``NEVER``, of this family.
    """

    architecture: str
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    windows: str = "none"
    capped: bool = False
    even_heads: bool = False
    whole_heads: bool = False
    experts: ExpertNames | None = None
    never: Mapping[str, Any] = field(default_factory=dict)
    activation_key: str = "hidden_act"
    ignored: tuple[str, ...] = field(default=())
    """Keys of ``NEVER`` that transformers does not read for this family."""


def _defaults(max_position_embeddings: int, **others: Any) -> dict[str, Any]:
    return {
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "max_position_embeddings": max_position_embeddings,
        **others,
    }


def _routers(coefficient: float) -> dict[str, Any]:
    return {"output_router_logits": False, "router_aux_loss_coef": coefficient}


_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", LLAMA, _defaults(2048), even_heads=True),
    "mistral": Family(
        "MistralForCausalLM",
        LLAMA,
        _defaults(131072, num_key_value_heads=8, sliding_window=4096),
        windows="all",
        ignored=("attention_bias", "mlp_bias"),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        LLAMA | {"qkv_bias": True},
        _defaults(32768, num_key_value_heads=32, **_QWEN_WINDOWS),
        windows="layers",
        ignored=("attention_bias", "mlp_bias"),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        LLAMA | {"qk_norm": "head"},
        _defaults(32768, num_key_value_heads=32, head_dim=128, **_QWEN_WINDOWS),
        windows="layers",
        ignored=("mlp_bias",),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            **PLAIN,
            "qkv_bias": False,
            "qk_norm": "none",
            "norm_placement": "around",
            "norm_offset": True,
            "scale_embeddings": True,
        },
        _defaults(
            8192,
            num_key_value_heads=4,
            head_dim=256,
            tie_word_embeddings=True,
            hidden_activation="gelu_pytorch_tanh",
            query_pre_attn_scalar=256,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            sliding_window=4096,
        ),
        windows="layers",
        capped=True,
        even_heads=True,
        activation_key="hidden_activation",
        ignored=("mlp_bias",),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        LLAMA | {"qk_norm": "projection", "norm_placement": "after"},
        _defaults(2048, rms_norm_eps=1e-5),
        ignored=("mlp_bias",),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        LLAMA | {"normalize_experts": True},
        _defaults(
            131072,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            sliding_window=None,
            num_experts=8,
            num_experts_per_tok=2,
            **_routers(0.001),
        ),
        windows="all",
        experts=ExpertNames(
            "block_sparse_moe",
            {"gate": "w1", "up": "w3", "down": "w2"},
            count="num_local_experts",
            normalized=None,
        ),
        never={"router_jitter_noise": 0.0},
        ignored=("attention_bias", "mlp_bias"),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        LLAMA | {"qk_norm": "head"},
        _defaults(
            32768,
            num_key_value_heads=4,
            use_sliding_window=False,
            sliding_window=4096,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=False,
            **_routers(0.001),
        ),
        windows="all",
        experts=ExpertNames("mlp", _PROJECTIONS, size="moe_intermediate_size"),
        never={"decoder_sparse_step": 1, "mlp_only_layers": []},
        ignored=("mlp_bias",),
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        LLAMA | {"qk_norm": "projection"},
        _defaults(
            4096,
            rms_norm_eps=1e-5,
            num_experts=64,
            num_experts_per_tok=8,
            norm_topk_prob=False,
            **_routers(0.01),
        ),
        whole_heads=True,
        experts=PER_EXPERT,
        never={"clip_qkv": None},
        ignored=("mlp_bias",),
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {
            **LLAMA,
            "qkv_bias": True,
            "output_bias": True,
            "attention_sinks": True,
            "expert_bias": True,
            "normalize_experts": True,
            "activation": "clamped_swiglu",
        },
        _defaults(
            131072,
            num_key_value_heads=8,
            head_dim=64,
            rms_norm_eps=1e-5,
            rope_theta=150000.0,
            rope_parameters=_GPT_OSS_ROPE,
            sliding_window=128,
            num_experts=128,
            num_experts_per_tok=4,
            **_routers(0.001),
        ),
        windows="layers",
        experts=ExpertNames(
            "mlp",
            {"gate": "gate_up_proj", "down": "down_proj"},
            count="num_local_experts",
            normalized=None,
            router="router",
            together=True,
        ),
        never={"attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        ignored=("mlp_bias",),
    ),
}
