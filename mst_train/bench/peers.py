"""The LM head with its loss, and the gated MLP, as others implement them.

Each runs forward and backward on the same tensors. Gradients are held to float64.

Legend: N tokens, D hidden, F intermediate, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
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
from mst_train.bench.progress import progress
from mst_train.bench.systems import loss_tiles, mlp_tiles
from mst_train.bench.workload import chosen, lengths, loss_problems, missing
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

NEEDED = {
    "liger_fused": "liger_kernel",
    "cut_cross_entropy": "cut_cross_entropy",
    "deepspeed": "deepspeed",
}
"""The package that a variant needs."""

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
    with progress(runs * len(lengths(config)) * (1 + config.bench.repetitions)) as advance:
        for tokens in lengths(config):
            for make in (head, mlp):
                work = make(config, tokens, device)
                measurements = _measure(work, wanted, config, device, advance)
                for m in measurements:
                    rows.append(m.row(work.name, tokens, peer=not m.variant.startswith("mst")))
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
    tensors = {"hidden": hidden, "weight": weight}

    def ours(chunk_tokens: int | str) -> Tensor:
        loss, _ = mini_sequence_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
        return loss / tokens

    def exact(hidden_CD: Tensor, labels_C: Tensor, weight_VD: Tensor) -> Tensor:
        logits_CV = F.linear(hidden_CD, weight_VD)
        return F.cross_entropy(logits_CV, labels_C, reduction="sum") / tokens

    return Work(
        name="head",
        tensors=tensors,
        tokens=tokens,
        loss={
            "torch": lambda: cross_entropy(hidden, weight, labels)[0] / tokens,
            **_torch_linear_cross_entropy(hidden, weight, labels),
            "liger_fused": partial(_liger, hidden, weight, labels),
            "cut_cross_entropy": partial(_cut_cross_entropy, hidden, weight, labels),
            "deepspeed": partial(
                _deepspeed_loss, hidden, weight, labels, loss_tiles(tokens, config)
            ),
            "mst": lambda: ours(config.memory.head_chunk_tokens),
        },
        ours=ours,
        truth=_truth(tensors, labels.split(TRUTH_CHUNK), exact),
        bytes_per_token=config.model.vocab_size * hidden.element_size(),
    )


def mlp(config: BenchConfig, tokens: int, device: torch.device) -> Work:
    """The gated MLP of x [1, N, D], against a fixed gradient of its output."""
    generator = torch.Generator(device).manual_seed(config.train.seed)
    dtype = weight_type(config.precision)
    hidden, intermediate = config.model.hidden_size, config.model.intermediate_size
    x = _leaf((1, tokens, hidden), 1.0, dtype, generator)
    gate = _leaf((intermediate, hidden), hidden**-0.5, dtype, generator)
    up = _leaf((intermediate, hidden), hidden**-0.5, dtype, generator)
    down = _leaf((hidden, intermediate), intermediate**-0.5, dtype, generator)
    dy = _leaf((1, tokens, hidden), 1.0, dtype, generator).detach()
    tensors = {"x": x, "gate": gate, "up": up, "down": down}

    def ours(chunk_tokens: int | str) -> Tensor:
        return _Against.of(mini_sequence_mlp(x, gate, up, down, chunk_tokens=chunk_tokens), dy)

    def exact(x_C: Tensor, dy_C: Tensor, *weights: Tensor) -> Tensor:
        return _Against.of(gated_mlp(x_C, *weights), dy_C.double())

    return Work(
        name="mlp",
        tensors=tensors,
        tokens=tokens,
        loss={
            "torch": lambda: _Against.of(gated_mlp(x, gate, up, down), dy),
            "deepspeed": lambda: _Against.of(
                _deepspeed_mlp(x, gate, up, down, mlp_tiles(tokens, hidden)), dy
            ),
            "mst": lambda: ours(config.memory.mlp_chunk_tokens),
        },
        ours=ours,
        truth=_truth(tensors, dy.split(TRUTH_CHUNK, 1), exact),
        bytes_per_token=3 * intermediate * x.element_size(),
    )


# --- measuring -----------------------------------------------------------------------------------


def _measure(
    work: Work,
    wanted: Sequence[str],
    config: BenchConfig,
    device: torch.device,
    advance: Callable[[str], None],
) -> list[Measurement]:
    def begins(name: str) -> None:
        advance(f"{work.name} {name}")

    variants, measurements = [], []
    for name, loss in work.loss.items():
        if name in wanted:
            begins(name)
            variants.append(_variant(name, loss, work, device))
            measurements.append(first_run(variants[-1], device))
    if MATCHED in wanted:
        begins(MATCHED)
        variant, measurement = _matched(work, measurements, device)
        variants.append(variant)
        measurements.append(measurement)
    time_rounds(variants, measurements, config.bench.repetitions, device, advance=begins)
    return measurements


def _variant(
    name: str, loss: Callable[[], Tensor] | str, work: Work, device: torch.device
) -> Variant:
    """loss: as in ``Work``; it is not called where its package is missing."""
    peer = not name.startswith("mst")
    problem = missing([NEEDED[name]] if name in NEEDED else [], device)
    if problem is not None or isinstance(loss, str):
        return Variant(name, lambda: None, problem=problem or str(loss), peer=peer)

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
        variant = _variant(MATCHED, "not run: no chunked peer to match", work, device)
        return variant, first_run(variant, device)
    chunk, per_token = min(256, work.tokens), float(work.bytes_per_token)
    last: tuple[int, int] | None = None
    for _ in range(6):
        variant = _variant(MATCHED, partial(work.ours, chunk), work, device)
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


def _truth(
    tensors: dict[str, Tensor],
    others: Iterable[Tensor],
    loss: Callable[..., Tensor],
) -> dict[str, Tensor]:
    """Gradients in float64 of a sum over tokens, ``TRUTH_CHUNK`` at a time.

    tensors: the input, its tokens in the last dimension but one, and the weights. others: what goes
    with each chunk of it. loss: takes the chunk, that, and the weights.
    """
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors.values()]
    for chunk, other in zip(wide[0].split(TRUTH_CHUNK, -2), others, strict=True):
        loss(chunk, other, *wide[1:]).backward()
    return {name: t.grad for name, t in zip(tensors, wide, strict=True) if t.grad is not None}


class _Against(torch.autograd.Function):
    """A scalar whose gradient with respect to y is a given array; costs next to nothing."""

    @staticmethod
    def of(y: Tensor, dy: Tensor) -> Tensor:
        return _Against.apply(y, dy)  # type: ignore[no-untyped-call]

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
    whole = "torch_linear_cross_entropy"
    chunked, compact = f"{whole}_chunked", f"{whole}_compact"
    function: Any = getattr(F, "linear_cross_entropy", None)
    if function is None:
        reason = f"not run: torch {torch.__version__} has no linear_cross_entropy"
        return dict.fromkeys((whole, chunked, compact), reason)
    loss = partial(function, hidden, weight, labels)
    options: Any = getattr(nn, "LinearCrossEntropyOptions", None)
    if options is None:
        reason = f"not run: torch {torch.__version__} cannot chunk linear_cross_entropy"
        return {whole: loss, chunked: reason, compact: reason}
    small = options(acc_policy="compact", chunking_method="aspect_ratio:4")
    return {
        whole: loss,
        chunked: partial(loss, options=options()),
        compact: partial(loss, options=small),
    }


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels)


def _cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Its Triton kernels on CUDA for 16-bit types; its compiled torch code elsewhere."""
    from cut_cross_entropy import linear_cross_entropy

    kernels = hidden.device.type == "cuda" and hidden.dtype != torch.float32
    implementation = "cce" if kernels else "torch_compile"
    return linear_cross_entropy(hidden, weight, labels, impl=implementation)


def _deepspeed_loss(hidden: Tensor, weight: Tensor, labels: Tensor, tiles: int) -> Tensor:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def tile_loss(_: Any, hidden_CD: Tensor, labels_C: Tensor) -> Tensor:
        logits_CV = F.linear(hidden_CD, weight).float()
        return F.cross_entropy(logits_CV, labels_C, reduction="sum") / len(labels)

    return TiledFusedLogitsLoss.apply(
        tile_loss, None, hidden[None], labels[None], None, tiles, [weight], "sum"
    )


def _deepspeed_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, tiles: int) -> Tensor:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def tile(_: Any, x_CD: Tensor) -> Tensor:
        return gated_mlp(x_CD, gate, up, down)

    return TiledMLP.apply(tile, None, x, tiles, [gate, up, down])
