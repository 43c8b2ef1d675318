"""The LM head with its loss, and the gated MLP, as others implement them.

Each runs forward and backward on the same tensors. Gradients are held to float64.

Legend: N tokens, D hidden, F intermediate, V vocabulary.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mst_train.bench.config import BenchConfig
from mst_train.bench.measure import (
    Measurement,
    Variant,
    collect_garbage,
    first_run,
    time_rounds,
)
from mst_train.bench.progress import Progress
from mst_train.bench.systems import loss_tiles, mlp_tiles
from mst_train.bench.workload import chosen, lengths, loss_problems
from mst_train.mst import cross_entropy, gated_mlp, mini_sequence_cross_entropy, mini_sequence_mlp
from mst_train.precision import weight_type

HEAD = (
    "torch",
    "torch_linear_cross_entropy",
    "torch_linear_cross_entropy_chunked",
    "torch_linear_cross_entropy_compact",
    "liger_fused",
    "cut_cross_entropy",
    "deepspeed",
    "mst",
)
MLP = ("torch", "deepspeed", "mst")
MATCHED = "mst_matched"
"""Ours in the memory of the leanest other implementation; in both pieces of work."""

CHUNKED = (
    "torch_linear_cross_entropy_chunked",
    "torch_linear_cross_entropy_compact",
    "liger_fused",
    "deepspeed",
)
"""Other implementations that never hold all logits, or all intermediates."""

TRUTH_CHUNK = 512


@dataclass(frozen=True)
class Work:
    """A piece of work: what it is differentiated in, and how each variant computes it.

    loss: for each variant, the scalar to differentiate, or why there is none. Ours takes the
    tokens of a chunk.
    truth: the gradients in float64.
    bytes_per_token: what a token in a chunk of ours takes.
    """

    name: str
    tensors: dict[str, Tensor]
    tokens: int
    loss: dict[str, Callable[[], Tensor] | str]
    ours: Callable[[int | str], Tensor]
    truth: dict[str, Tensor]
    bytes_per_token: int


def run(config: BenchConfig, device: torch.device) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of measurements, and what is wrong with them."""
    names = (*HEAD, MATCHED)
    wanted = chosen(config, names)
    rows, problems = [], []
    runs = sum(name in wanted for work in (HEAD, MLP) for name in (*work, MATCHED))
    with Progress(runs * len(lengths(config)) * (1 + config.bench.repetitions)) as progress:
        for tokens in lengths(config):
            for make in (head, mlp):
                work = make(config, tokens, device)
                measurements = _measure(work, wanted, config, device, progress)
                rows += [_row(work, tokens, m) for m in measurements]
                if make is head:
                    problems += loss_problems(measurements, weight_type(config.precision))
                del work
                collect_garbage(device)
    return rows, problems


def head(config: BenchConfig, tokens: int, device: torch.device) -> Work:
    """Mean cross-entropy of hidden states [N, D] under a head [V, D]."""
    generator = torch.Generator(device).manual_seed(config.train.seed)
    dtype = weight_type(config.precision)
    shape_ND = (tokens, config.model.hidden_size)
    shape_VD = (config.model.vocab_size, config.model.hidden_size)
    hidden = _leaf(shape_ND, 1.0, dtype, generator)
    weight = _leaf(shape_VD, config.model.hidden_size**-0.5, dtype, generator)
    labels = torch.randint(shape_VD[0], (tokens,), generator=generator, device=device)

    def ours(chunk_tokens: int | str) -> Tensor:
        loss, _ = mini_sequence_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
        return loss / tokens

    return Work(
        name="head",
        tensors={"hidden": hidden, "weight": weight},
        tokens=tokens,
        loss={
            "torch": lambda: cross_entropy(hidden, weight, labels)[0] / tokens,
            **_torch_linear_cross_entropy(hidden, weight, labels),
            "liger_fused": _liger(hidden, weight, labels),
            "cut_cross_entropy": _cut_cross_entropy(hidden, weight, labels),
            "deepspeed": _deepspeed_loss(hidden, weight, labels, loss_tiles(tokens, config)),
            "mst": lambda: ours(config.memory.head_chunk_tokens),
        },
        ours=ours,
        truth=_head_truth(hidden, weight, labels),
        bytes_per_token=config.model.vocab_size * hidden.element_size(),
    )


def mlp(config: BenchConfig, tokens: int, device: torch.device) -> Work:
    """The gated MLP of x [N, D], against a fixed gradient of its output."""
    generator = torch.Generator(device).manual_seed(config.train.seed)
    dtype = weight_type(config.precision)
    hidden, intermediate = config.model.hidden_size, config.model.intermediate_size
    x = _leaf((1, tokens, hidden), 1.0, dtype, generator)
    gate = _leaf((intermediate, hidden), hidden**-0.5, dtype, generator)
    up = _leaf((intermediate, hidden), hidden**-0.5, dtype, generator)
    down = _leaf((hidden, intermediate), intermediate**-0.5, dtype, generator)
    dy = _leaf((1, tokens, hidden), 1.0, dtype, generator).detach()

    def ours(chunk_tokens: int | str) -> Tensor:
        return _Against.of(mini_sequence_mlp(x, gate, up, down, chunk_tokens=chunk_tokens), dy)

    return Work(
        name="mlp",
        tensors={"x": x, "gate": gate, "up": up, "down": down},
        tokens=tokens,
        loss={
            "torch": lambda: _Against.of(gated_mlp(x, gate, up, down), dy),
            "deepspeed": _deepspeed_mlp(x, gate, up, down, dy, mlp_tiles(tokens, hidden)),
            "mst": lambda: ours(config.memory.mlp_chunk_tokens),
        },
        ours=ours,
        truth=_mlp_truth(x, gate, up, down, dy),
        bytes_per_token=3 * intermediate * x.element_size(),
    )


# --- measuring -----------------------------------------------------------------------------------


def _measure(
    work: Work, wanted: Sequence[str], config: BenchConfig, device: torch.device, progress: Progress
) -> list[Measurement]:
    variants = [_variant(name, loss, work) for name, loss in work.loss.items() if name in wanted]
    measurements = []
    for variant in variants:
        progress.advance(f"{work.name} {variant.name}")
        measurements.append(first_run(variant, device))
    if MATCHED in wanted:
        progress.advance(f"{work.name} {MATCHED}")
        variant, measurement = _matched(work, measurements, device)
        variants.append(variant)
        measurements.append(measurement)
    time_rounds(
        variants,
        measurements,
        config.bench.repetitions,
        device,
        advance=lambda name: progress.advance(f"{work.name} {name}"),
    )
    return measurements


def _variant(name: str, loss: Callable[[], Tensor] | str, work: Work) -> Variant:
    peer = not name.startswith("mst")
    if isinstance(loss, str):
        return Variant(name, lambda: None, problem=loss, peer=peer)

    def prepare() -> None:
        for tensor in work.tensors.values():
            tensor.grad = None

    def run() -> Tensor:
        result = loss()
        result.backward()
        return result.detach()

    def inspect(result: Tensor) -> dict[str, Any]:
        errors = {}
        for key, tensor in work.tensors.items():
            assert tensor.grad is not None
            errors[key] = _relative_error(tensor.grad, work.truth[key])
        return {"loss": result.item(), "gradient_errors": errors}

    compiled = name == "cut_cross_entropy"
    return Variant(name, run, prepare, inspect, peer=peer, compiled=compiled)


def _matched(
    work: Work, measurements: Sequence[Measurement], device: torch.device
) -> tuple[Variant, Measurement]:
    """Ours with about the largest chunk whose peak is not above the leanest chunked peer's.

    Ours holds a fixed amount and one chunk, so two chunk sizes tell what a third would hold;
    nearly, since the moment of the peak may depend on the chunk too.
    """
    peaks = [m.peak_bytes for m in measurements if m.variant in CHUNKED and m.peak_bytes]
    if not peaks:
        return _unmatched("not run: no chunked peer to match")
    chunk, per_token = min(256, work.tokens), float(work.bytes_per_token)
    last: tuple[int, int] | None = None
    for _ in range(6):
        variant = _variant(MATCHED, partial(work.ours, chunk), work)
        measurement = first_run(variant, device)
        measurement.found["note"] = f"{chunk} tokens in a chunk"
        peak = measurement.peak_bytes
        if peak is None or (last is not None and peak <= min(peaks)):
            break
        if last is not None and last[0] != chunk:
            per_token = max((peak - last[1]) / (chunk - last[0]), 1.0)
        last = (chunk, peak)
        fitting = int(chunk + (min(peaks) - peak) / per_token)
        if peak > min(peaks):  # the largest that fits may not lie on the line: go below it
            fitting = min(fitting, int(0.98 * chunk))
        chunk = min(max(fitting, 1), work.tokens)
    return variant, measurement


def _unmatched(problem: str) -> tuple[Variant, Measurement]:
    variant = Variant(MATCHED, lambda: None, problem=problem)
    return variant, Measurement(MATCHED, problem=problem)


def _row(work: Work, tokens: int, measurement: Measurement) -> dict[str, Any]:
    return {
        "work": work.name,
        "tokens": tokens,
        "variant": measurement.variant,
        "peer": not measurement.variant.startswith("mst"),
        "seconds": measurement.seconds,
        "median_seconds": measurement.median_seconds,
        "min_seconds": measurement.min_seconds,
        "cpu_seconds": measurement.cpu_seconds,
        "peak_bytes": measurement.peak_bytes,
        **measurement.found,
        "problem": measurement.problem,
        "failed": measurement.failed,
    }


def _relative_error(gradient: Tensor, truth: Tensor) -> float:
    """Relative Frobenius norm of the difference, in float64, some rows at a time."""
    norm = torch.linalg.vector_norm
    gradient, truth = gradient.view(-1, truth.shape[-1]), truth.view(-1, truth.shape[-1])
    pairs = zip(gradient.split(16384), truth.split(16384), strict=True)
    errors = torch.stack([norm(g.double() - t) for g, t in pairs])
    return float(norm(errors) / norm(truth))


# --- tensors and truth ---------------------------------------------------------------------------


def _leaf(
    shape: tuple[int, ...], std: float, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    values = torch.randn(shape, generator=generator, device=generator.device) * std
    return nn.Parameter(values.to(dtype))


def _head_truth(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean loss in float64, some tokens at a time."""
    weight64 = weight.detach().double().requires_grad_()
    hidden64 = hidden.detach().double().requires_grad_()
    for h, y in zip(hidden64.split(TRUTH_CHUNK), labels.split(TRUTH_CHUNK), strict=True):
        (F.cross_entropy(F.linear(h, weight64), y, reduction="sum") / len(labels)).backward()
    assert hidden64.grad is not None and weight64.grad is not None
    return {"hidden": hidden64.grad, "weight": weight64.grad}


def _mlp_truth(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, dy: Tensor) -> dict[str, Tensor]:
    tensors = {
        name: tensor.detach().double().requires_grad_()
        for name, tensor in (("x", x), ("gate", gate), ("up", up), ("down", down))
    }
    pieces = zip(tensors["x"].split(TRUTH_CHUNK, 1), dy.split(TRUTH_CHUNK, 1), strict=True)
    for x_, dy_ in pieces:
        y_ = gated_mlp(x_, tensors["gate"], tensors["up"], tensors["down"])
        y_.backward(dy_.double())
    return {name: t.grad for name, t in tensors.items() if t.grad is not None}


class _Against(torch.autograd.Function):
    """A scalar whose gradient with respect to y is a given array; costs next to nothing."""

    @staticmethod
    def of(y: Tensor, dy: Tensor) -> Tensor:
        scalar: Tensor = _Against.apply(y, dy)  # type: ignore[no-untyped-call]
        return scalar

    @staticmethod
    def forward(ctx: Any, y: Tensor, dy: Tensor) -> Tensor:
        ctx.save_for_backward(dy)
        return y.flatten()[0].float()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        (dy,) = ctx.saved_tensors
        return dy, None


# --- other implementations -----------------------------------------------------------------------


def _torch_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor
) -> dict[str, Callable[[], Tensor] | str]:
    """Torch's own (from 2.13 on): as it is, with its own choice of chunks, and with small ones."""
    name = "torch_linear_cross_entropy"
    function: Any = getattr(F, "linear_cross_entropy", None)
    if function is None:
        missing = f"not run: torch {torch.__version__} has no linear_cross_entropy"
        return dict.fromkeys((name, f"{name}_chunked", f"{name}_compact"), missing)
    options: Any = getattr(nn, "LinearCrossEntropyOptions", None)
    if options is None:
        missing = f"not run: torch {torch.__version__} cannot chunk linear_cross_entropy"
        return {
            name: lambda: function(hidden, weight, labels),
            f"{name}_chunked": missing,
            f"{name}_compact": missing,
        }
    compact = options(acc_policy="compact", chunking_method="aspect_ratio:4")
    return {
        name: lambda: function(hidden, weight, labels),
        f"{name}_chunked": lambda: function(hidden, weight, labels, options=options()),
        f"{name}_compact": lambda: function(hidden, weight, labels, options=compact),
    }


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], Tensor] | str:
    if hidden.device.type != "cuda":
        return "not run: needs CUDA"
    if importlib.util.find_spec("liger_kernel") is None:
        return "not run: liger_kernel not installed"

    def loss() -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        result: Tensor = liger_fused_linear_cross_entropy(hidden, weight, labels)
        return result

    return loss


def _cut_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor
) -> Callable[[], Tensor] | str:
    """Its Triton kernels on CUDA for 16-bit types; its compiled torch code elsewhere."""
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return "not run: cut_cross_entropy not installed"
    kernels = hidden.device.type == "cuda" and hidden.dtype != torch.float32

    def loss() -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        implementation = "cce" if kernels else "torch_compile"
        result: Tensor = linear_cross_entropy(hidden, weight, labels, impl=implementation)
        return result

    return loss


def _deepspeed_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, tiles: int
) -> Callable[[], Tensor] | str:
    if importlib.util.find_spec("deepspeed") is None:
        return "not run: deepspeed not installed"

    def tile_loss(_: Any, hidden_CD: Tensor, labels_C: Tensor) -> Tensor:
        logits_CV = F.linear(hidden_CD, weight).float()
        return F.cross_entropy(logits_CV, labels_C, reduction="sum") / len(labels)

    def loss() -> Tensor:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

        result: Tensor = TiledFusedLogitsLoss.apply(
            tile_loss, None, hidden[None], labels[None], None, tiles, [weight], "sum"
        )
        return result

    return loss


def _deepspeed_mlp(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, dy: Tensor, tiles: int
) -> Callable[[], Tensor] | str:
    if importlib.util.find_spec("deepspeed") is None:
        return "not run: deepspeed not installed"

    def tile(_: Any, x_CD: Tensor) -> Tensor:
        return gated_mlp(x_CD, gate, up, down)

    def loss() -> Tensor:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

        return _Against.of(TiledMLP.apply(tile, None, x, tiles, [gate, up, down]), dy)

    return loss
