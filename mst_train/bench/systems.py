"""Whole training steps: this project's, transformers', DeepSpeed's ALST and Liger's.

All of them use the same weights: transformers' models have this project's parameters put in the
place of their own. So losses and gradients can be compared, and each starts from the same memory.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mst_train.bench.config import BenchConfig
from mst_train.bench.measure import Variant, collect_garbage
from mst_train.bench.step import measure_steps, policy_of
from mst_train.bench.workload import Batch, build, chosen, lengths, missing
from mst_train.model import Transformer
from mst_train.model.hf.config import write_config
from mst_train.model.hf.names import places_by_name
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
    forwards = {
        name: _forward(name, config, ours, device)
        for name, problem in problems.items()
        if problem is None
    }

    def variants(batch: Batch) -> list[Variant]:
        reference: dict[str, Tensor] = {}
        return [
            _variant(name, partial(forwards[name], batch), ours, reference)
            if name in forwards
            else Variant(name, lambda: None, problem=problems[name], peer=True)
            for name in wanted
        ]

    rows, wrong = measure_steps(config, device, len(wanted), variants)
    return rows, wrong + _gradient_problems(rows, weight_type(config.precision))


def compared_gradients(model: Transformer) -> dict[str, nn.Parameter]:
    """The parameters of ``COMPARED``."""
    first: Any = model.blocks[0]
    last: Any = model.blocks[-1]
    weights = (
        model.embedding.weight,
        first.attention.query.weight,
        first.mlp.gate.weight,
        last.attention.key.weight,
        last.mlp.down.weight,
        model.head.weight,
    )
    return dict(zip(COMPARED, weights, strict=True))


def _variant(
    name: str, forward: Callable[[], Tensor], ours: Transformer, reference: dict[str, Tensor]
) -> Variant:
    def run() -> Tensor:
        loss = forward()
        loss.backward()
        return loss.detach()

    def inspect(loss: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {"loss": loss.item(), "gradient_errors": {}}
        for key, parameter in compared_gradients(ours).items():
            assert parameter.grad is not None
            gradient = parameter.grad[:COMPARED_ROWS].float()
            reference.setdefault(key, gradient.clone())
            found["gradient_errors"][key] = _difference(gradient, reference[key])
        return found

    forget = partial(ours.zero_grad, set_to_none=True)  # everybody's parameters
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


def _forward(
    name: str, config: BenchConfig, ours: Transformer, device: torch.device
) -> Callable[[Batch], Tensor]:
    """What computes the mean loss of a batch."""
    if name == "mst":
        return lambda batch: ours(batch.tokens, batch.labels)[0] / batch.valid_tokens
    if name == "liger":
        model, rope = _liger_model(config, ours, device)
    else:
        model, rope = _transformers_model(config, ours, device), _rope()
    if name != "transformers":
        enable_checkpointing(model)
    if name == "alst":
        for layer in model.model.layers:
            layer.mlp.forward = MethodType(_tiled_mlp_forward, layer.mlp)

    def forward(batch: Batch) -> Tensor:
        from transformers.models.llama import modeling_llama

        modeling_llama.apply_rotary_pos_emb = rope  # where all of these models look it up
        if name == "alst":
            return _tiled_loss(model, batch, loss_tiles(batch.tokens.shape[1], config))
        # The model shifts the labels by itself.
        return model(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss

    return forward


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

    weights = [mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight]
    tiles = mlp_tiles(x_BSD.shape[1], x_BSD.shape[2])
    return TiledMLP.apply(type(mlp).forward, mlp, x_BSD, tiles, weights)


def loss_tiles(tokens: int, config: BenchConfig) -> int:
    """Tiles of DeepSpeed's tiled loss, by the bytes of fp32 logits in one."""
    logits_bytes = 4 * tokens * config.model.vocab_size
    return max(math.ceil(logits_bytes / (config.bench.loss_tile_mib * 2**20)), 1)


def mlp_tiles(tokens: int, hidden_size: int) -> int:
    """Tiles of DeepSpeed's tiled MLP: as many tokens in one as the hidden state is wide."""
    return math.ceil(tokens / hidden_size)


# --- transformers --------------------------------------------------------------------------------


def _transformers_model(config: BenchConfig, ours: Transformer, device: torch.device) -> Any:
    """transformers' Llama of the same dimensions, over this project's parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = write_config(config.model, "llama", max(lengths(config)))
    settings = AutoConfig.for_model(**values, attn_implementation="sdpa", use_cache=False)
    # The type here and not by a later .to(), which would round the rotary angles too.
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(settings, dtype=weight_type(config.precision))
    for name, place in places_by_name(ours, "llama"):
        module, _, kind = name.rpartition(".")
        setattr(model.get_submodule(module), kind, place.parameter)
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
