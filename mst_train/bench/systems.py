"""Whole training steps: this project's, transformers', DeepSpeed's ALST and Liger's.

All of them use the same weights: transformers' models have this project's parameters put in the
place of their own. So losses and gradients can be compared, and each starts from the same memory.
"""

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mst_train.bench.config import BenchConfig
from mst_train.bench.measure import Measurement, Variant, collect_garbage, measure
from mst_train.bench.progress import Progress
from mst_train.bench.step import policy_of, step_rows
from mst_train.bench.workload import Batch, build, chosen, lengths, loss_problems, random_batch
from mst_train.model import Transformer
from mst_train.precision import weight_type

VARIANTS = ("transformers", "transformers_checkpointing", "alst", "liger", "mst")

GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""How far gradients may lie apart: relative Frobenius norm, by the weights' type."""

COMPARED = ("embedding", "first query", "first gate", "last key", "last down", "head")
"""Gradients that are compared: of what a step computes first and last."""

COMPARED_ROWS = 512
"""Rows of each compared gradient that are kept: enough to tell, and little memory."""


def run(config: BenchConfig, device: torch.device) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of measurements, and what is wrong with them."""
    wanted = chosen(config, VARIANTS)
    ours = build(config, device)
    models: dict[str, Any] = {}
    missing = {name: _missing(name, device) for name in wanted}
    if any(name not in ("mst", "liger") and missing[name] is None for name in wanted):
        models["transformers"] = _transformers_model(config, ours, device)
        models["rope"] = _transformers_rope()
    if "liger" in wanted and missing["liger"] is None:
        models["liger"], models["liger_rope"] = _liger_model(config, ours, device)
    rows, problems = [], []
    repetitions = config.bench.repetitions
    with Progress(len(lengths(config)) * len(wanted) * (1 + repetitions)) as progress:
        for length in lengths(config):
            batch = random_batch(config, length, device)
            reference: dict[str, Tensor] = {}
            variants = [
                _variant(name, missing[name], ours, models, batch, reference, config)
                for name in wanted
            ]
            measurements = measure(variants, repetitions, device, advance=progress.advance)
            rows += step_rows(config, length, measurements, device)
            problems += loss_problems(measurements, weight_type(config.precision))
            problems += _gradient_problems(measurements, weight_type(config.precision))
            del variants
            collect_garbage(device)
    return rows, problems


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
    name: str,
    problem: str | None,
    ours: Transformer,
    models: dict[str, Any],
    batch: Batch,
    reference: dict[str, Tensor],
    config: BenchConfig,
) -> Variant:
    if problem is not None:
        return Variant(name, _never, problem=problem, peer=True)
    arrange, forward = {
        "mst": _mst,
        "transformers": _transformers,
        "transformers_checkpointing": _checkpointing,
        "alst": _alst,
        "liger": _liger,
    }[name](ours, models, batch, config)

    def prepare() -> None:
        ours.zero_grad(set_to_none=True)  # everybody's parameters
        arrange()

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

    return Variant(name, run, prepare, inspect, peer=name != "mst")


def _difference(gradient: Tensor, reference: Tensor) -> float:
    """Relative Frobenius norm."""
    norm = torch.linalg.vector_norm
    return float(norm(gradient - reference) / norm(reference).clamp_min(1e-30))


def _gradient_problems(measurements: list[Measurement], dtype: torch.dtype) -> list[str]:
    tolerance = GRADIENT_TOLERANCE[dtype]
    return [
        f"the gradient of {key} of {m.variant} differs by {error:.1e} from the first variant's, "
        f"more than {tolerance:g}"
        for m in measurements
        for key, error in m.found.get("gradient_errors", {}).items()
        if not error <= tolerance
    ]


def _missing(name: str, device: torch.device) -> str | None:
    """Why a variant cannot run here."""
    packages = {
        "mst": (),
        "alst": ("transformers", "deepspeed"),
        "liger": ("transformers", "liger_kernel"),
    }.get(name, ("transformers",))
    if name == "liger" and device.type != "cuda":
        return "not run: needs CUDA"
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    if absent:
        return f"not run: {' and '.join(absent)} not installed"
    return None


def _never() -> None:
    raise AssertionError("a variant that cannot run here was run")


# --- the variants: how each is arranged before a step, and its loss ------------------------------

Arranged = tuple[Callable[[], None], Callable[[], Tensor]]


def _mst(ours: Transformer, models: dict[str, Any], batch: Batch, config: BenchConfig) -> Arranged:
    def arrange() -> None:
        ours.policy = policy_of("mst", config)

    def loss() -> Tensor:
        loss_sum: Tensor = ours(batch.tokens, batch.labels)[0]
        return loss_sum / batch.valid_tokens

    return arrange, loss


def _transformers(
    ours: Transformer, models: dict[str, Any], batch: Batch, config: BenchConfig
) -> Arranged:
    return partial(_arrange, models, checkpointing=False), partial(_own_loss, models, batch)


def _checkpointing(
    ours: Transformer, models: dict[str, Any], batch: Batch, config: BenchConfig
) -> Arranged:
    return partial(_arrange, models), partial(_own_loss, models, batch)


def _arrange(models: dict[str, Any], *, checkpointing: bool = True, tiled: bool = False) -> None:
    """Set transformers' model up for a step."""
    model = models["transformers"]
    _use_rope(models["rope"])
    _checkpoint_layers(model, checkpointing)
    _tile_mlps(model, tiled=tiled)


def _own_loss(models: dict[str, Any], batch: Batch, name: str = "transformers") -> Tensor:
    """The loss as the model itself computes it; it shifts the labels by itself."""
    output = models[name](input_ids=batch.tokens, labels=batch.tokens, use_cache=False)
    loss: Tensor = output.loss
    return loss


def _alst(ours: Transformer, models: dict[str, Any], batch: Batch, config: BenchConfig) -> Arranged:
    """DeepSpeed's tiled MLP and tiled loss under checkpointing, as ArcticTraining sets them up.

    The loss reaches the tiled loss's end with a gradient of one: its backward does not scale the
    head's.
    """
    model = models["transformers"]
    tiles = loss_tiles(batch.tokens.shape[1], config)

    def tile_loss(model: Any, hidden_CD: Tensor, labels_C: Tensor) -> Tensor:
        logits_CV = model.lm_head(hidden_CD).float()
        loss_sum = nn.functional.cross_entropy(logits_CV, labels_C, reduction="sum")
        return loss_sum / batch.valid_tokens

    def loss() -> Tensor:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

        hidden_BSD = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
        weights = [model.lm_head.weight]
        loss: Tensor = TiledFusedLogitsLoss.apply(
            tile_loss, model, hidden_BSD, batch.labels, None, tiles, weights, "sum"
        )
        return loss

    return partial(_arrange, models, tiled=True), loss


def _liger(
    ours: Transformer, models: dict[str, Any], batch: Batch, config: BenchConfig
) -> Arranged:
    def arrange() -> None:
        _use_rope(models["liger_rope"])
        _checkpoint_layers(models["liger"], True)

    return arrange, partial(_own_loss, models, batch, "liger")


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
    from transformers import LlamaConfig, LlamaForCausalLM

    m = config.model
    settings = LlamaConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=m.intermediate_size,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_heads,
        num_key_value_heads=m.num_kv_heads,
        head_dim=m.head_dim,
        rms_norm_eps=m.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
        max_position_embeddings=max(lengths(config)),
        tie_word_embeddings=m.tie_embeddings,
        attn_implementation="sdpa",
        use_cache=False,
    )
    previous = torch.get_default_dtype()
    # Not by a later .to(), which would round the rotary angles too.
    torch.set_default_dtype(weight_type(config.precision))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(settings).train()
    finally:
        torch.set_default_dtype(previous)
    _share_parameters(ours, model)
    collect_garbage(device)
    return model


def _share_parameters(ours: Transformer, theirs: Any) -> None:
    """Put this project's parameters in the place of transformers'."""
    theirs.model.embed_tokens.weight = ours.embedding.weight
    theirs.model.norm.weight = ours.norm.weight
    theirs.lm_head.weight = ours.head.weight
    blocks: Any = ours.blocks
    for block, layer in zip(blocks, theirs.model.layers, strict=True):
        layer.input_layernorm.weight = block.attention_norm.weight
        layer.self_attn.q_proj.weight = block.attention.query.weight
        layer.self_attn.k_proj.weight = block.attention.key.weight
        layer.self_attn.v_proj.weight = block.attention.value.weight
        layer.self_attn.o_proj.weight = block.attention.output.weight
        layer.post_attention_layernorm.weight = block.mlp_norm.weight
        layer.mlp.gate_proj.weight = block.mlp.gate.weight
        layer.mlp.up_proj.weight = block.mlp.up.weight
        layer.mlp.down_proj.weight = block.mlp.down.weight


def _checkpoint_layers(model: Any, wanted: bool) -> None:
    """Switch transformers' activation recomputation; its methods had another name before 5."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if getattr(model, f"is_{name}_checkpointing") == wanted:
        return  # enabling it again would add another hook to the embedding
    if wanted:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def _tile_mlps(model: Any, *, tiled: bool) -> None:
    """Replace every MLP's forward by DeepSpeed's tiled one, or take it back."""
    for layer in model.model.layers:
        if tiled:
            layer.mlp.forward = MethodType(_tiled_mlp_forward, layer.mlp)
        else:
            layer.mlp.__dict__.pop("forward", None)


def _tiled_mlp_forward(mlp: Any, x_BSD: Tensor) -> Tensor:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    weights = [mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight]
    tiles = mlp_tiles(x_BSD.shape[1], x_BSD.shape[2])
    y_BSD: Tensor = TiledMLP.apply(type(mlp).forward, mlp, x_BSD, tiles, weights)
    return y_BSD


def _use_rope(rope: Any) -> None:
    """Which rotary embedding transformers' models call: it is looked up in their module."""
    from transformers.models.llama import modeling_llama

    modeling_llama.apply_rotary_pos_emb = rope


def _transformers_rope() -> Any:
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
