"""Configurations of Hugging Face checkpoints (config.json) and this project's, both ways.

``families`` has the table of what is supported. Whatever a config.json says beyond that
is refused where it would change the result, and ignored where transformers ignores it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mst_train.config import ModelConfig, RopeScalingConfig, model_problems
from mst_train.errors import UserError
from mst_train.model.hf.families import (
    ACTIVATIONS,
    COUNTS,
    FAMILIES,
    NEVER,
    SIZES,
    SPANS,
    Family,
)
from mst_train.model.rope import ntk_theta

LARGEST = 1 << 30
MOST_LAYERS = 10_000
"""Larger numbers are damage: they would overflow, or take for ever, before the weights are looked
at."""

_OF_LENGTH = {"factor": "factor", "original_max_position_embeddings": "original_length"}
_OF_YARN = ("beta_fast", "beta_slow", "attention_factor")
SCALINGS = {
    "linear": {"factor": "factor"},
    "llama3": _OF_LENGTH
    | {"low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor"},
    "yarn": _OF_LENGTH | {key: key for key in _OF_YARN},
}
"""What config.json states of each kind of scaled rotary embeddings, and the settings' names of it.
yarn's own may be null."""

QUANTIZED = (
    ": write the weights in bf16 by transformers first (of mxfp4: "
    "quantization_config=Mxfp4Config(dequantize=True))"
)

# --- from config.json ----------------------------------------------------------------------------


def read_model_type(values: Mapping[str, Any], where: str) -> str:
    """The family of ``FAMILIES`` that a config.json names. Raises UserError where there is none."""
    name = str(values.get("model_type"))
    if name not in FAMILIES:
        raise UserError(
            f"{where}: model_type={name} is not supported: it must be one of {', '.join(FAMILIES)}"
        )
    return name


def read_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The settings of the model that a config.json describes.

    where: the file's name, for messages. Raises UserError with everything that is not supported.
    """
    family = FAMILIES[read_model_type(values, where)]
    reader = _Reader(values, family.defaults)
    _refuse_unsupported(family, reader)
    settings: dict[str, Any] = dict(family.fixed)
    for key, setting in SIZES.items():
        settings[setting] = reader.whole(key)
    if settings["num_layers"] > MOST_LAYERS:
        reader.refuse("num_hidden_layers", f"it must be at most {MOST_LAYERS:,}")
    settings["num_kv_heads"] = reader.whole("num_key_value_heads", settings["num_heads"])
    settings["head_size"] = reader.whole("head_dim", 0) or None
    settings["norm_epsilon"] = reader.number("rms_norm_eps")
    settings["initializer_std"] = reader.number("initializer_range")
    settings["tie_embeddings"] = bool(reader.values["tie_word_embeddings"])
    settings["max_positions"] = reader.whole("max_position_embeddings")
    activation = str(reader.values[family.activation_key])
    settings.setdefault("activation", ACTIVATIONS.get(activation, activation))
    if activation not in ACTIVATIONS:
        reader.refuse(family.activation_key, f"it must be one of {', '.join(ACTIVATIONS)}")
    if family.capped:
        settings["attention_scale"] = reader.number("query_pre_attn_scalar") ** -0.5
        settings["attention_softcap"] = reader.number("attn_logit_softcapping", None)
        settings["logit_softcap"] = reader.number("final_logit_softcapping", None)
    settings |= _read_experts(family, reader)
    settings |= _read_windows(family, reader, settings["num_layers"])
    settings |= _read_rope(reader)
    if reader.problems:
        raise UserError([f"{where}: {problem}" for problem in reader.problems])
    config = ModelConfig(**settings)
    if config.num_heads and config.head_size == config.hidden_size / config.num_heads:
        config = replace(config, head_size=None)
    problems = list(model_problems(config))
    if problems:
        raise UserError([f"{where} describes an impossible model: {line}" for line in problems])
    return config


class _Reader:
    """Values of a config.json, and what is wrong with them."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.stated = values
        self.values = {**defaults, **values}
        self.problems: list[str] = []

    def refuse(self, key: str, reason: str) -> None:
        self.problems.append(f"{key}={self.values.get(key)} is not supported: {reason}")

    def whole(self, key: str, if_null: int | None = None) -> int:
        """A whole number; ``if_null`` for null."""
        value = self.values.get(key)
        if value is None and if_null is not None:
            return if_null
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > LARGEST:
            self.refuse(key, f"it must be a whole number of at most {LARGEST:,}")
            return 1
        return value

    def number(self, key: str, if_null: Any = 1.0) -> Any:
        """A number above 0; ``if_null`` for null, which by default is a problem."""
        value = self.values.get(key)
        if value is None and if_null is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
            self.refuse(key, "it must be a number greater than 0")
            return 1.0
        return float(value)


def _refuse_unsupported(family: Family, reader: _Reader) -> None:
    for key, only in (NEVER | dict(family.never)).items():
        value = reader.values.get(key)
        if key not in family.ignored and value is not None and value != only:
            advice = QUANTIZED if key == "quantization_config" else ""
            reader.refuse(key, f"it must be {json.dumps(only)} or left out{advice}")
    architectures = reader.values.get("architectures")
    if architectures is not None and family.architecture not in _listed(architectures):
        reader.refuse("architectures", f"it must name {family.architecture}")


def _read_experts(family: Family, reader: _Reader) -> dict[str, Any]:
    """The settings of mixtures of experts."""
    names, values = family.experts, reader.values
    if names is None:
        return {}
    settings: dict[str, Any] = {
        "num_experts": reader.whole(_count_key(reader)),
        "experts_per_token": reader.whole("num_experts_per_tok"),
        "intermediate_size": reader.whole(names.size),
    }
    if names.normalized is not None:
        settings["normalize_experts"] = bool(values[names.normalized])
    # transformers adds the loss to a model's own where it gives out the routers' logits.
    if values["output_router_logits"] and values["router_aux_loss_coef"] != 0:
        settings["balance_loss"] = reader.number("router_aux_loss_coef")
    return settings


def _count_key(reader: _Reader) -> str:
    """The key that says how many experts there are."""
    stated = [key for key in COUNTS if key in reader.stated]
    if len({str(reader.values[key]) for key in stated}) > 1:
        reader.refuse(stated[0], f"{stated[1]}={reader.values[stated[1]]} says otherwise")
    return stated[0] if stated else COUNTS[0]


def _read_windows(family: Family, reader: _Reader, layers: int) -> dict[str, Any]:
    """The settings of sliding windows."""
    values = reader.values
    if family.windows == "none" or values.get("sliding_window") is None:
        return {}
    kinds = values.get("layer_types")
    if family.windows == "all":
        spans = ["sliding"] * layers
    elif kinds is not None:
        unknown = set(map(str, _listed(kinds))) - set(SPANS)
        if unknown or len(_listed(kinds)) != layers:
            reader.refuse(
                "layer_types", f"it must name {' or '.join(SPANS)} for each of {layers} layers"
            )
            return {}
        spans = [SPANS[kind] for kind in kinds]
    elif "max_window_layers" in family.defaults:
        first = reader.whole("max_window_layers")
        spans = ["sliding" if layer >= first else "full" for layer in range(layers)]
    else:
        spans = ["full" if layer % 2 else "sliding" for layer in range(layers)]
    if "use_sliding_window" in family.defaults and not values["use_sliding_window"]:
        spans = ["full"] * layers
    if "sliding" not in spans:
        return {}
    return {
        "sliding_window": reader.whole("sliding_window"),
        "sliding_window_pattern": _shortest_pattern(spans),
    }


def _listed(value: Any) -> list[Any]:
    """A list; an empty one in the place of anything else."""
    return value if isinstance(value, list) else []


def _shortest_pattern(spans: list[str]) -> list[str]:
    """What, repeated, gives these."""
    lengths = range(1, len(spans) + 1)
    return next(
        spans[:length]
        for length in lengths
        if all(span == spans[i % length] for i, span in enumerate(spans))
    )


def _read_rope(reader: _Reader) -> dict[str, Any]:
    """The settings of rotary embeddings, from transformers 4's keys or 5's ``rope_parameters``."""
    given = reader.values.get("rope_scaling") or reader.values.get("rope_parameters") or {}
    if not isinstance(given, dict):
        reader.problems.append(f"rope_scaling={given} is not supported: it must be an object")
        return {}
    if any(isinstance(value, dict) for value in given.values()):
        reader.problems.append("rope_parameters that differ between layers are not supported")
        return {}
    rope = _Reader(given, {"rope_theta": reader.values["rope_theta"]})
    rope.values.setdefault(
        "original_max_position_embeddings", reader.values.get("max_position_embeddings")
    )
    kind = str(rope.values.get("rope_type") or rope.values.get("type") or "default")
    scaling: dict[str, Any] = {}
    for key, setting in SCALINGS.get(kind, {}).items():
        if setting == "original_length":
            scaling[setting] = rope.whole(key)
        elif key not in _OF_YARN or rope.values.get(key) is not None:
            scaling[setting] = rope.number(key)
    if kind == "yarn":
        for key in ("mscale", "mscale_all_dim"):
            if rope.values.get(key) is not None:
                rope.refuse(key, "it must be left out")
        if rope.values.get("truncate") not in (None, True, False):
            rope.refuse("truncate", "it must be true, false or left out")
        scaling["truncate"] = rope.values.get("truncate") is not False
    elif kind not in ("default", *SCALINGS):
        rope.problems.append(
            f"rope_type={kind} is not supported: it must be one of default, {', '.join(SCALINGS)}"
        )
    if rope.values.get("partial_rotary_factor") not in (None, 1):
        rope.refuse("partial_rotary_factor", "it must be 1 or left out")
    theta = rope.number("rope_theta")
    reader.problems += [f"rope_scaling: {problem}" for problem in rope.problems]
    stretched = RopeScalingConfig(kind, **scaling) if scaling else RopeScalingConfig()
    return {"rope_theta": theta, "rope_scaling": stretched}


# --- to config.json ------------------------------------------------------------------------------


def write_config(
    config: ModelConfig, model_type: str | None = None, sequence_length: int | None = None
) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        model_type: the family; None: the first of ``FAMILIES`` that has such models.
        sequence_length: the longest sequence the model is for, where ``max_positions`` is less.

    Raises:
        UserError: no family, or not this one, has such models, or no length is known.
    """
    if model_type is not None and model_type not in FAMILIES:
        raise UserError(
            f"model_type={model_type} is not supported: it must be one of {', '.join(FAMILIES)}"
        )
    candidates = [model_type] if model_type else list(FAMILIES)
    problems = {name: list(_foreign(FAMILIES[name], config)) for name in candidates}
    chosen = next((name for name, lines in problems.items() if not lines), None)
    if chosen is None:
        raise UserError(
            [f"a {name} model cannot have {', '.join(lines)}" for name, lines in problems.items()]
        )
    longest = max(config.max_positions or 0, sequence_length or 0)
    if not longest:
        raise UserError(
            "config.json states the longest sequence that a model is for: set model.max_positions"
        )
    family = FAMILIES[chosen]
    names = (name for name, ours in ACTIVATIONS.items() if ours == config.activation)
    activation = next(names, family.defaults.get(family.activation_key))
    values: dict[str, Any] = {"architectures": [family.architecture], "model_type": chosen}
    values |= {key: getattr(config, setting) for key, setting in SIZES.items()}
    values |= {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        family.activation_key: activation,
        "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.initializer_std,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": longest,
    }
    if family.capped:
        values |= {
            "query_pre_attn_scalar": _query_scalar(config),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    values |= _write_experts(family, config)
    return values | _write_windows(family, config) | _write_rope(family, config)


def _foreign(family: Family, config: ModelConfig) -> Iterator[str]:
    """Settings that no model of a family has."""
    if "activation" not in family.fixed and config.activation not in ACTIVATIONS.values():
        yield f"model.activation={config.activation}"
    if (family.experts is None) != (config.num_experts is None):
        yield f"model.num_experts={'null' if config.num_experts is None else config.num_experts}"
    for setting, value in family.fixed.items():
        if getattr(config, setting) != value:
            yield f"model.{setting}={getattr(config, setting)}"
    if family.even_heads and config.hidden_size % config.num_heads:
        yield (
            f"model.hidden_size={config.hidden_size} with model.num_heads={config.num_heads} "
            f"(transformers wants a multiple)"
        )
    if family.whole_heads and config.num_heads * config.head_dim != config.hidden_size:
        yield (
            f"model.head_size={config.head_dim} with model.num_heads={config.num_heads} and "
            f"model.hidden_size={config.hidden_size} (transformers wants their product to be this)"
        )
    windows = _windows(config)
    if (family.windows == "none" and any(windows)) or (
        family.windows == "all" and len(set(windows)) > 1
    ):
        yield (
            f"model.sliding_window={config.sliding_window} with model.sliding_window_pattern="
            f"{config.sliding_window_pattern}"
        )
    scale = config.attention_scale
    if scale is not None and not family.capped and scale != config.head_dim**-0.5:
        yield f"model.attention_scale={scale}"
    if family.capped and not isinstance(_query_scalar(config), int):
        yield f"model.attention_scale={scale} (it must be 1 / sqrt(n) with a whole n)"


def _windows(config: ModelConfig) -> list[int | None]:
    return [config.window(layer) for layer in range(config.num_layers)]


def _query_scalar(config: ModelConfig) -> int | float:
    """What the scores are divided by the square root of."""
    if config.attention_scale is None:
        return config.head_dim
    scalar = config.attention_scale**-2
    return round(scalar) if round(scalar) ** -0.5 == config.attention_scale else scalar


def _write_experts(family: Family, config: ModelConfig) -> dict[str, Any]:
    names = family.experts
    if names is None:
        return {}
    inside, used = config.intermediate_size, config.experts_per_token
    values = {
        # Of layers without experts, where experts have a key of their own: as many features.
        "intermediate_size": inside * used,
        names.size: inside,
        names.count: config.num_experts,
        "num_experts_per_tok": used,
        "output_router_logits": config.balance_loss > 0,
        **family.never,
    }
    if names.normalized is not None:
        values[names.normalized] = config.normalize_experts
    if config.balance_loss > 0:
        values["router_aux_loss_coef"] = config.balance_loss
    return values


def _write_windows(family: Family, config: ModelConfig) -> dict[str, Any]:
    windows = _windows(config)
    window = config.sliding_window if any(windows) else None
    if family.windows == "none":
        return {}
    values: dict[str, Any] = {"sliding_window": window}
    if family.windows == "layers":
        if window is None and "use_sliding_window" not in family.defaults:
            values["sliding_window"] = family.defaults["sliding_window"]  # of no layer
        values["layer_types"] = [
            "sliding_attention" if window else "full_attention" for window in windows
        ]
    if "use_sliding_window" in family.defaults:
        values["use_sliding_window"] = window is not None
    if "max_window_layers" in family.defaults:
        values["max_window_layers"] = windows.index(window) if window else config.num_layers
    return values


def _write_rope(family: Family, config: ModelConfig) -> dict[str, Any]:
    """As transformers 4 has it, which 5 and others read too."""
    scaling, theta = config.rope_scaling, config.rope_theta
    if scaling.type in ("none", "ntk"):
        theta = ntk_theta(config) if scaling.type == "ntk" else theta
        plain = None
        if "rope_parameters" in family.defaults:  # and null means these
            plain = {"rope_type": "default", "rope_theta": theta}
        return {"rope_theta": theta, "rope_scaling": plain}
    values = {key: getattr(scaling, setting) for key, setting in SCALINGS[scaling.type].items()}
    stated = {key: value for key, value in values.items() if value is not None}
    rope = {"rope_type": scaling.type, **stated}
    if not scaling.truncate:
        rope["truncate"] = False
    return {"rope_theta": theta, "rope_scaling": rope}
