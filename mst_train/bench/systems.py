"""Whole training steps: this project's, transformers', DeepSpeed's ALST and Liger's.

All of them use the same weights: transformers' models have this project's parameters put in the
place of their own, or copies. So losses and gradients can be compared, and a peak is what a step
takes beside them.
"""

import math
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mst_train.bench.config import BenchConfig
from mst_train.bench.measure import Variant, collect_garbage
from mst_train.bench.step import measure_steps, policy_of
from mst_train.bench.workload import Batch, build, chosen, lengths, missing
from mst_train.model import Transformer
from mst_train.model.hf.config import write_config
from mst_train.model.hf.names import Part, places_by_name
from mst_train.plan.baseline import enable_checkpointing
from mst_train.precision import weight_type

NEEDED = {
    "transformers": ("transformers",),
    "transformers_checkpointing": ("transformers",),
    "alst": ("transformers", "deepspeed"),
    "liger": ("transformers", "liger_kernel"),
    "mst": (),
}
"""The variants, and the packages that each needs."""

GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""How far gradients may lie apart: relative Frobenius norm, by the weights' type."""

COMPARED = ("embedding", "first query", "first gate", "last key", "last down", "head")
"""Gradients that are compared: of what a step computes first and last."""

COMPARED_ROWS = 512
"""Rows of each compared gradient that are kept: enough to tell, and little memory."""


def run(config: BenchConfig, device: torch.device) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of measurements, and what is wrong with them."""
    wanted = chosen(config, list(NEEDED))
    problems = {name: missing(NEEDED[name], device) for name in wanted}
    ours = build(config, device)
    ours.policy = policy_of("mst", config)
    if config.model.num_experts is not None and "liger" in problems:
        problems["liger"] = "not run: mixtures of experts have no kernels of Liger's"
    systems = {
        name: _system(name, config, ours, device)
        for name, problem in problems.items()
        if problem is None
    }

    def variants(batch: Batch) -> list[Variant]:
        reference: dict[str, Tensor] = {}
        return [
            _variant(name, systems, batch, reference)
            if name in systems
            else Variant(name, lambda: None, problem=problems[name], peer=True)
            for name in wanted
        ]

    rows, wrong = measure_steps(config, device, len(wanted), variants)
    return rows, wrong + _gradient_problems(rows, weight_type(config.precision))


class System(NamedTuple):
    """A model, and what computes the mean loss of a batch with it."""

    model: nn.Module
    loss: Callable[[Batch], Tensor]


def compared_gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of ``COMPARED``, of this project's model or transformers'."""
    first: Any
    last: Any
    embedding: Any
    head: Any
    if isinstance(model, Transformer):
        first, last = model.blocks[0], model.blocks[-1]
        embedding, head = model.embedding, model.head
        query, key = first.attention.query, last.attention.key
        gate, down = first.mlp.gate, last.mlp.down
    else:
        first, last = model.model.layers[0], model.model.layers[-1]
        embedding, head = model.model.embed_tokens, model.lm_head
        query, key = first.self_attn.q_proj, last.self_attn.k_proj
        if hasattr(first.mlp, "experts"):
            gate, down = first.mlp.experts.gate_up_proj, last.mlp.experts.down_proj
        else:
            gate, down = first.mlp.gate_proj, last.mlp.down_proj
    weights = [getattr(part, "weight", part) for part in (embedding, query, gate, key, down, head)]
    weights = [getattr(part, "weight", part) for part in (embedding, query, gate, key, down, head)]
    gradients = [w.grad[0] if w.ndim == 3 else w.grad for w in weights]  # the first expert's
    gradients[2] = gradients[2][: gradients[4].shape[-1]]  # without up, where both are one
    return {
        name: gradient[:COMPARED_ROWS].float()
        for name, gradient in zip(COMPARED, gradients, strict=True)
    }


def _variant(
    name: str, systems: dict[str, System], batch: Batch, reference: dict[str, Tensor]
) -> Variant:
    system = systems[name]

    def forget() -> None:
        for other in systems.values():
            other.model.zero_grad(set_to_none=True)

    def run() -> Tensor:
        loss = system.loss(batch)
        loss.backward()
        return loss.detach()

    def inspect(loss: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {"loss": loss.item(), "gradient_errors": {}}
        for key, gradient in compared_gradients(system.model).items():
            reference.setdefault(key, gradient.clone())
            found["gradient_errors"][key] = _difference(gradient, reference[key])
        return found

    return Variant(name, run, forget, inspect, peer=name != "mst")


def _difference(gradient: Tensor, reference: Tensor) -> float:
    """Relative Frobenius norm."""
    norm = torch.linalg.vector_norm
    return float(norm(gradient - reference) / norm(reference).clamp_min(1e-30))


def _gradient_problems(rows: Sequence[dict[str, Any]], dtype: torch.dtype) -> list[str]:
    tolerance = GRADIENT_TOLERANCE[dtype]
    return [
        f"the gradient of {key} of {row['variant']} differs by {error:.1e} from the first "
        f"variant's, more than {tolerance:g}"
        for row in rows
        for key, error in row.get("gradient_errors", {}).items()
        if not error <= tolerance
    ]


# --- the variants: the loss of each --------------------------------------------------------------


def _system(name: str, config: BenchConfig, ours: Transformer, device: torch.device) -> System:
    if name == "mst":
        return System(ours, lambda batch: ours(batch.tokens, batch.labels)[0] / batch.valid_tokens)
    if name == "liger":
        model, rope = _liger_model(config, ours, device)
    else:
        model, rope = _transformers_model(config, ours, device), _rope()
    if name != "transformers":
        enable_checkpointing(model)
    if name == "alst":
        for layer in model.model.layers:
            layer.mlp.forward = MethodType(_tiled_mlp_forward, layer.mlp)

    def loss(batch: Batch) -> Tensor:
        from transformers.models.llama import modeling_llama

        modeling_llama.apply_rotary_pos_emb = rope  # where all of the Llamas look it up
        if name == "alst":
            return _tiled_loss(model, batch, loss_tiles(batch.tokens.shape[1], config))
        # The model shifts the labels by itself.
        return model(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss

    return System(model, loss)


def _tiled_loss(model: Any, batch: Batch, tiles: int) -> Tensor:
    """DeepSpeed's tiled loss behind its tiled MLP, as ArcticTraining sets them up.

    The loss reaches the tiled loss's end with a gradient of one: its backward does not scale the
    head's.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def tile_loss(model: Any, hidden_CD: Tensor, labels_C: Tensor) -> Tensor:
        logits_CV = model.lm_head(hidden_CD).float()
        loss_sum = nn.functional.cross_entropy(logits_CV, labels_C, reduction="sum")
        return loss_sum / batch.valid_tokens

    hidden_BSD = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    weights = [model.lm_head.weight]
    return TiledFusedLogitsLoss.apply(
        tile_loss, model, hidden_BSD, batch.labels, None, tiles, weights, "sum"
    )


def _tiled_mlp_forward(mlp: Any, x_BSD: Tensor) -> Tensor:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    tiles = mlp_tiles(x_BSD.shape[1], x_BSD.shape[2])
    return TiledMLP.apply(_tile_forward, mlp, x_BSD, tiles, list(mlp.parameters()))


def _tile_forward(mlp: Any, x: Tensor) -> Tensor:
    """Of a tile [B, T, D], or in the backward [B * T, D], which experts do not take."""
    y: Tensor = type(mlp).forward(mlp, x if x.ndim == 3 else x[None])
    return y.view_as(x)


def loss_tiles(tokens: int, config: BenchConfig) -> int:
    """Tiles of DeepSpeed's tiled loss, by the bytes of fp32 logits in one."""
    logits_bytes = 4 * tokens * config.model.vocab_size
    return max(math.ceil(logits_bytes / (config.bench.loss_tile_mib * 2**20)), 1)


def mlp_tiles(tokens: int, hidden_size: int) -> int:
    """Tiles of DeepSpeed's tiled MLP: as many tokens in one as the hidden state is wide."""
    return math.ceil(tokens / hidden_size)


# --- transformers --------------------------------------------------------------------------------


def _transformers_model(config: BenchConfig, ours: Transformer, device: torch.device) -> Any:
    """transformers' Llama or Mixtral of the same dimensions, over this project's parameters.

    But for those of experts, gate and up of which are one parameter there: these are copies.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    family = "llama" if config.model.num_experts is None else "mixtral"
    values = write_config(config.model, family, max(lengths(config)))
    settings = AutoConfig.for_model(**values, attn_implementation="sdpa", use_cache=False)
    # The type here and not by a later .to(), which would round the rotary angles too.
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(settings, dtype=weight_type(config.precision))
    for name, place in places_by_name(ours, family):
        if isinstance(place, Part) and place.expert is None:
            module, _, kind = name.replace("block_sparse_moe", "mlp").rpartition(".")
            setattr(model.get_submodule(module), kind, place.parameter)
    if family == "mixtral":
        for layer, block in zip(model.model.layers, ours.blocks, strict=True):
            mlp: Any = block.mlp
            with torch.no_grad():
                layer.mlp.experts.gate_up_proj.copy_(torch.cat([mlp.gate, mlp.up], dim=1))
                layer.mlp.experts.down_proj.copy_(mlp.down)
    model.lm_head.weight = ours.head.weight  # tied ones have one name
    collect_garbage(device)
    return model.train()


def _rope() -> Any:
    from transformers.models.llama import modeling_llama

    return modeling_llama.apply_rotary_pos_emb


def _liger_model(config: BenchConfig, ours: Transformer, device: torch.device) -> tuple[Any, Any]:
    """transformers' model with Liger's kernels, and Liger's rotary embedding.

    What Liger changes in transformers' module, for all models made later, is undone here.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    model = _transformers_model(config, ours, device)
    names = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
    originals = {name: getattr(modeling_llama, name) for name in names}
    apply_liger_kernel_to_llama(model=model)
    rope = modeling_llama.apply_rotary_pos_emb
    for name, original in originals.items():
        setattr(modeling_llama, name, original)
    return model, rope
