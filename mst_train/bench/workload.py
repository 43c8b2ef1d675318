"""The work of a training step: a model, random tokens, and the checks that variants agree."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mst_train.attention import select_attention, select_kernels
from mst_train.bench.config import BenchConfig
from mst_train.bench.measure import Measurement
from mst_train.errors import UserError
from mst_train.model import Transformer, build_model
from mst_train.precision import weight_type

LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
"""How far the losses of variants may lie apart, relative to the loss, by the weights' type."""


@dataclass(frozen=True)
class Batch:
    """Random tokens: what a step computes does not depend on what they say.

    tokens, labels: [1, S] int64; the last token has nothing to predict.
    """

    tokens: Tensor
    labels: Tensor

    @property
    def valid_tokens(self) -> int:
        return self.tokens.shape[1] - 1


def prepare_device(config: BenchConfig) -> torch.device:
    """The device to measure on, with the threads and kernels that are configured."""
    if config.bench.threads is not None:
        torch.set_num_threads(config.bench.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    select_kernels(config.kernel, device, weight_type(config.precision))
    return device


def random_batch(config: BenchConfig, length: int, device: torch.device) -> Batch:
    """One sequence of ``length`` random tokens."""
    generator = torch.Generator().manual_seed(config.train.seed)
    tokens = torch.randint(config.model.vocab_size, (1, length), generator=generator).to(device)
    return Batch(tokens, torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100))


def build(config: BenchConfig, device: torch.device) -> Transformer:
    """The configured model, freshly initialised."""
    dtype = weight_type(config.precision)
    return build_model(
        config.model,
        attention=select_attention(config.kernel.attention, device, dtype),
        device=device,
        dtype=dtype,
        seed=config.train.seed,
    )


def lengths(config: BenchConfig) -> list[int]:
    """The lengths to measure."""
    return list(config.bench.lengths) or [config.data.sequence_length]


def chosen(config: BenchConfig, names: Sequence[str]) -> list[str]:
    """The names of the variants to measure, in their own order.

    Raises UserError for a name that there is not.
    """
    wanted = config.bench.variants
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise UserError(
            f"bench.variants names {', '.join(unknown)}: +bench={config.bench.kind} has "
            f"{', '.join(names)}"
        )
    return [name for name in names if not wanted or name in wanted]


def missing(packages: Sequence[str], device: torch.device) -> str | None:
    """Why a variant that needs these packages cannot run here, if it cannot."""
    if "liger_kernel" in packages and device.type != "cuda":
        return "not run: needs CUDA"
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    return f"not run: {' and '.join(absent)} not installed" if absent else None


def loss_problems(measurements: Sequence[Measurement], dtype: torch.dtype) -> list[str]:
    """Where losses differ by more than their type explains, or are not finite."""
    losses = {m.variant: m.found["loss"] for m in measurements if "loss" in m.found}
    problems = [f"the loss of {name} is {loss}" for name, loss in losses.items() if loss - loss]
    if problems or not losses:
        return problems
    reference_name, reference = next(iter(losses.items()))
    tolerance = LOSS_TOLERANCE[dtype]
    return [
        f"the loss of {name} is {loss:.7f} and that of {reference_name} {reference:.7f}: they "
        f"differ by more than {tolerance:g} of it"
        for name, loss in losses.items()
        if not math.isclose(loss, reference, rel_tol=tolerance)
    ]
