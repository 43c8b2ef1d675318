"""transformers' decoder layers as row-wise blocks, and the table of models that have them.

A ``RowwiseLayer`` is a view of one decoder layer: it calls the layer's own norms and projections,
so that whatever they are (adapters on them, for one) is what runs. Only attention, and an MLP of
plain linear layers, are computed by this project.

Legend: B batch, T positions of a chunk, D hidden, F intermediate, H query heads, K key-value heads,
E head size.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import GELUTanh, SiLUActivation
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from mst_train.integrations.huggingface.calls import altered, origin
from mst_train.model.hf.families import FAMILIES as DECODERS
from mst_train.model.hf.families import Family as DecoderFamily
from mst_train.mst import Scores, mini_sequence_experts, mini_sequence_mlp
from mst_train.mst.chunking import BLOCK_BYTES, chunk_slices, resolve_chunk_tokens


@dataclass(frozen=True)
class Family:
    """A family of models, by the names of its classes in transformers.

    module: the module below ``transformers.models``.
    prefix: what its classes' names begin with.
    norms: where a layer's norms are. before: on what attention and MLP read. around: on their
        results too. after: on their results alone.
    windows: which layers have the sliding window of the configuration: none, all, or those that
        ``layer_types`` says.
    head_norms: queries and keys are normed. none, head (each head), projection (all together).
    fused: one projection for queries, keys and values.
    experts: a mixture of experts is in the MLP's place.
    sinks: attention has sinks, and the MLP is a mixture of experts under its name (gpt-oss), which
        goes through the block's chunks as it is.
    """

    module: str
    prefix: str
    norms: str = "before"
    windows: str = "none"
    head_norms: str = "none"
    fused: bool = False
    experts: bool = False
    sinks: bool = False

    @classmethod
    def of(cls, model_type: str, decoder: DecoderFamily) -> "Family":
        """A family that our own decoder has."""
        return cls(
            model_type,
            decoder.architecture.removesuffix("ForCausalLM"),
            norms=decoder.fixed["norm_placement"],
            windows=decoder.windows,
            head_norms=decoder.fixed["qk_norm"],
            experts=decoder.experts is not None and not decoder.experts.together,
            sinks=decoder.fixed["attention_sinks"],
        )

    @property
    def causal_lm(self) -> str:
        return f"{self.prefix}ForCausalLM"

    def get(self, name: str) -> Any:
        """What the family's module has by this name."""
        module = importlib.import_module(
            f"transformers.models.{self.module}.modeling_{self.module}"
        )
        return getattr(module, name)

    def scores(self, layer: Any, index: int) -> Scores:
        """What the attention of a layer computes that is at this place."""
        attention = layer.self_attn
        config = attention.config
        window = None
        if self.windows == "all":
            window = config.sliding_window
        elif self.windows == "layers":
            sliding = config.layer_types[index] == "sliding_attention"
            window = config.sliding_window if sliding else None
        softcap = getattr(attention, "attn_logit_softcapping", None)
        return Scores(window, softcap, attention.scaling, self.sinks)

    def problem(self, layer: Any) -> str | None:
        """Why a layer's attention and MLP cannot be computed in their place, if they cannot."""
        mlp = "SparseMoeBlock" if self.experts else "MLP"
        for name, suffix in (("self_attn", "Attention"), ("mlp", mlp)):
            part, own = getattr(layer, name), self.get(self.prefix + suffix)
            if type(part) is not own:
                theirs = f"transformers' own {self.prefix}{suffix}"
                return f"{name} is a {origin(part)} and not {theirs}"
        attention = layer.self_attn
        reason = altered(attention)
        if reason is not None:
            return f"self_attn {reason}, and mini-sequences do not call it"
        if attention.attention_dropout:
            dropout = attention.attention_dropout
            return f"self_attn.attention_dropout={dropout} is not supported: it must be 0"
        if not attention.is_causal:
            return "self_attn.is_causal=False is not supported: attention is causal"
        implementation = attention.config._attn_implementation
        for mapping in (self.get("ALL_ATTENTION_FUNCTIONS"), ALL_MASK_ATTENTION_FUNCTIONS):
            function = mapping.get(implementation)
            if function is not None and origin(function).partition(".")[0] != "transformers":
                return (
                    f"attention {implementation!r} is {origin(function)} and not transformers' "
                    f"own, and mini-sequences compute theirs: model.set_attn_implementation('sdpa')"
                )
        return None


FAMILIES = (
    *(Family.of(name, decoder) for name, decoder in DECODERS.items()),
    Family("phi3", "Phi3", windows="all", fused=True),
)
"""Those of our own decoder, and others whose checkpoints it does not read."""

NORMS = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "around": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
}
"""A layer's norms: before and after attention, before and after the MLP."""

ACTIVATIONS = {nn.SiLU: "silu", SiLUActivation: "silu", GELUTanh: "gelu_tanh"}
"""Modules whose function ``mini_sequence_mlp`` has."""


class RowwiseLayer:
    """A decoder layer as ``mini_sequence_block`` takes it. Has no tensors of its own.

    mlp_chunk_tokens: tokens of an MLP's chunk. rerun: whether the layer is run again in the
    backward; an MLP that is not plain linear layers then goes in the block's own chunks.
    """

    def __init__(
        self, layer: Any, family: Family, mlp_chunk_tokens: int | str, *, rerun: bool
    ) -> None:
        self._layer, self._family = layer, family
        self._mlp_chunk_tokens, self._rerun = mlp_chunk_tokens, rerun
        self._switches = _switches(layer) if rerun else None
        self._rotate: Callable[..., tuple[Tensor, Tensor]] = family.get("apply_rotary_pos_emb")
        self._norms = [name and getattr(layer, name) for name in NORMS[family.norms]]
        self._activation = plain_activation(layer, family)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._layer.parameters()

    def modules(self) -> Iterator[nn.Module]:
        return self._layer.modules()

    def before_attention(
        self, x: Tensor, *row_arguments: Tensor, queries: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """[B, T, D], cosines and sines [B or 1, T, E] -> q [B, T, H, E], k and v [B, T, K, E]."""
        if self._rerun and _switches(self._layer) != self._switches:
            raise RuntimeError(
                "adapters or dropout of a decoder layer were switched between the forward and the "
                "backward, in which the layer runs again: switch them after the backward, or "
                "apply_mini_sequence(recompute=False)"
            )
        norm = self._norms[0]
        q, k, v = self._project(norm(x) if norm else x, queries)
        rotated, k = self._rotate(k[:, :, :0] if q is None else q, k, *row_arguments, 2)
        return (None if q is None else rotated), k, v

    def after_attention(
        self, x: Tensor, out: Tensor, *, values: bool = True
    ) -> tuple[Tensor, Tensor]:
        """[B, T, D], [B, T, H, E] -> the residual and the MLP's branch, [B, T, D] each."""
        _, after_attention, before_mlp, after_mlp = self._norms
        attention_BTD = self._layer.self_attn.o_proj(out.flatten(2))
        stream_BTD = x + (after_attention(attention_BTD) if after_attention else attention_BTD)
        input_BTD = before_mlp(stream_BTD) if before_mlp else stream_BTD
        if after_mlp:
            return stream_BTD, after_mlp(self._mlp(input_BTD))
        return stream_BTD, self._mlp(input_BTD, values)

    def _project(self, x_BTD: Tensor, queries: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        attention = self._layer.self_attn
        if self._family.fused:
            config = attention.config
            size, key_size = config.num_attention_heads, config.num_key_value_heads
            heads = attention.qkv_proj(x_BTD).unflatten(-1, (-1, attention.head_dim))
            q, k, v = heads.split((size, key_size, key_size), dim=2)
            return q if queries else None, k, v
        q = self._heads(attention.q_proj(x_BTD), "q_norm") if queries else None
        v = attention.v_proj(x_BTD).unflatten(-1, (-1, attention.head_dim))
        return q, self._heads(attention.k_proj(x_BTD), "k_norm"), v

    def _heads(self, projected: Tensor, norm: str) -> Tensor:
        """[B, T, heads * E] -> [B, T, heads, E], normed where the family does."""
        attention, kind = self._layer.self_attn, self._family.head_norms
        if kind == "projection":
            projected = getattr(attention, norm)(projected)
        heads: Tensor = projected.unflatten(-1, (-1, attention.head_dim))
        if kind == "head":
            heads = getattr(attention, norm)(heads)
        return heads

    def chunk_tokens(self, asked: int | str, x_BSD: Tensor) -> int:
        """Tokens of a block's chunk, with "auto" so that its products' results are bounded.

        By the configuration: weights may be packed, or in parts on several processes.
        """
        config, head_dim = self._layer.self_attn.config, self._layer.self_attn.head_dim
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        features = heads * head_dim + config.hidden_size + self._mlp_features()
        bytes_per_token = 2 * features * x_BSD.element_size()
        tokens = x_BSD[..., 0].numel()
        return resolve_chunk_tokens(asked, tokens, bytes_per_token, x_BSD.device, BLOCK_BYTES)

    def _mlp_features(self) -> int:
        """Features of the results of the MLP's products, per token."""
        config = self._layer.self_attn.config
        if not self._family.experts and not self._family.sinks:
            return int(config.hidden_size + 2 * config.intermediate_size)
        inside = getattr(config, "moe_intermediate_size", config.intermediate_size)
        each = config.hidden_size + 2 * inside
        return int(config.num_local_experts + config.num_experts_per_tok * each)

    def _mlp(self, x_BTD: Tensor, values: bool = True) -> Tensor:
        mlp = self._layer.mlp
        if self._activation is not None:
            options: Any = {
                "chunk_tokens": self._mlp_chunk_tokens,
                "activation": self._activation,
                "values": values,
            }
            if not self._family.experts:
                weights = [projection.weight for projection in _projections(mlp)]
                return mini_sequence_mlp(x_BTD, *weights, **options)
            return mini_sequence_experts(
                x_BTD,
                mlp.gate.weight,
                *mlp.experts.gate_up_proj.chunk(2, dim=1),
                mlp.experts.down_proj,
                top_k=mlp.gate.top_k,
                normalize=getattr(mlp.gate, "norm_topk_prob", True),
                **options,
            )
        if self._rerun or not torch.is_grad_enabled():
            return self._as_it_is(x_BTD)
        # What its products give, each with its gradient.
        bytes_per_token = 2 * self._mlp_features() * x_BTD.element_size()
        tokens = resolve_chunk_tokens(
            self._mlp_chunk_tokens, x_BTD[..., 0].numel(), bytes_per_token, x_BTD.device
        )
        length = -(-tokens // x_BTD.shape[0])
        parts = [
            checkpoint(self._as_it_is, x_BTD[:, chunk].contiguous(), use_reentrant=False)
            for chunk in chunk_slices(x_BTD.shape[1], length)
        ]
        return torch.cat(parts, dim=1)

    def _as_it_is(self, x_BTD: Tensor) -> Tensor:
        y = self._layer.mlp(x_BTD)
        result: Tensor = y[0] if self._family.sinks else y  # and the routers' weights
        return result


def plain_activation(layer: Any, family: Family) -> str | None:
    """The activation of a layer's MLP that the method can compute in its place; None where it is
    more than linear layers, or experts, and an activation that is known."""
    mlp = layer.mlp
    if family.fused or family.sinks or altered(mlp) is not None:
        return None
    if family.experts:
        router, experts = mlp.gate, mlp.experts
        theirs = (family.get(f"{family.prefix}{name}") for name in ("TopKRouter", "Experts"))
        plain = [type(router), type(experts)] == [*theirs] and not getattr(mlp, "jitter_noise", 0)
        if not plain or altered(router) is not None or altered(experts) is not None:
            return None
        activation = experts.act_fn
    else:
        if not all(map(is_plain, _projections(mlp))):
            return None
        activation = mlp.act_fn
    return ACTIVATIONS.get(type(activation)) if altered(activation) is None else None


def _projections(mlp: Any) -> tuple[Any, Any, Any]:
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


def is_plain(module: nn.Module) -> bool:
    """Whether a linear layer is its weight alone: no bias, adapter, quantization or hook."""
    return type(module) is nn.Linear and module.bias is None and altered(module) is None


def _switches(layer: nn.Module) -> list[object]:
    """What decides, beside tensors, what a layer's dropout and PEFT's adapters in it compute."""
    found: list[object] = []
    for module in layer.modules():
        own = vars(module)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            found.append(_drops(module))
        elif "_active_adapter" in own:
            scaling = own.get("scaling")
            found += [own["_active_adapter"], own.get("_disable_adapters")]
            found.append(scaling.copy() if isinstance(scaling, dict) else scaling)
    return found


def _drops(module: nn.Module) -> bool:
    """Whether a module is dropout that is at work."""
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0


def once_only(layer: nn.Module) -> str | None:
    """Why a layer as it is now cannot run again in the backward, if it cannot."""
    for name, module in layer.named_modules():
        if "module_dropout" in vars(module) and module.training:
            return (
                f"{name} draws random numbers whenever it is trained (LoHa, LoKr), and would draw "
                f"others when the layer runs again: apply_mini_sequence(recompute=False), with the "
                f"model's own gradient checkpointing"
            )
        if _drops(module):
            return (
                f"{name} is dropout inside a decoder layer, which would be drawn anew when the "
                f"layer runs again: set it to 0 (lora_dropout=0), or "
                f"apply_mini_sequence(recompute=False)"
            )
    if getattr(getattr(layer, "_hf_hook", None), "offload", False):
        return (
            "Accelerate takes the layer's weights away after its call, and it runs again in the "
            "backward: offload smaller modules, or apply_mini_sequence(recompute=False)"
        )
    if any(parameter.is_meta and parameter.requires_grad for parameter in layer.parameters()):
        return (
            "weights that want gradients are offloaded by Accelerate, which loses their "
            "gradients: freeze them, or train them where they are"
        )
    return None
