"""Two comparisons of training, measured on this machine with a small model.

Three runs take each step in turn, from the same first weights, with the same tokens:

mst       sequences of full length, in mini-sequences
vanilla   the same sequences, everything kept: its losses have to be mst's
short     each sequence cut into short ones, in mini-sequences: what is lost is context alone
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from mst_train.attention import select_attention
from mst_train.cli.compose import compose
from mst_train.config import Config
from mst_train.data import Batch, Loader, fixed_batches, load_data
from mst_train.engine import NativeEngine
from mst_train.engine.step import train_step
from mst_train.errors import TrainingError
from mst_train.model import Policy, Transformer, build_model
from mst_train.optim import build_optimizer, learning_rate

SETTINGS = (
    "run.name=paper_convergence",
    "data.sequence_length=4096",
    "data.tokenizer_vocab_size=512",
    "model.vocab_size=512",
    "model.hidden_size=64",
    "model.intermediate_size=176",
    "model.num_layers=2",
    "memory.block_chunk_tokens=1024",
    "memory.mlp_chunk_tokens=512",
    "memory.head_chunk_tokens=512",
    "train.micro_batch_size=2",
    "train.steps=240",
    "train.eval_every=30",
    "train.eval_sequences=8",
    "optimizer.learning_rate=3e-3",
    "optimizer.warmup_steps=20",
)
SHORT = 512
FINAL_SEQUENCES = 32
"""Validation sequences at the end."""

TOLERANCE = 1e-3
"""How far, relative to the loss, the method's losses may be from those with everything kept."""

CPU = torch.device("cpu")


def converge(advance: Callable[[str], None]) -> dict[str, Any]:
    """The comparisons at the scale of the page."""
    return compare(compose(SETTINGS), SHORT, advance)


def compare(config: Config, short: int, advance: Callable[[str], None]) -> dict[str, Any]:
    """Losses, times and validation losses of the three runs.

    Raises TrainingError where the method's losses are not those of keeping everything.
    """
    train, length = config.train, config.data.sequence_length
    advance("reading the text")
    data = load_data(config.data)
    assert data.validation is not None
    loader = Loader(data.training, train.micro_batch_size, seed=train.seed)
    validation = list(fixed_batches(data.validation, 1, train.eval_sequences))
    vanilla = replace(config, memory=replace(config.memory, policy="vanilla"))
    runs = {
        "mst": Run(config, length),
        "vanilla": Run(vanilla, length),
        "short": Run(config, short),
    }
    for step in range(1, train.steps + 1):
        advance(f"step {step} of {train.steps}")
        batch = next(loader)
        rate = learning_rate(step, train.steps, config.optimizer)
        for name in _in_turn(list(runs), step):
            runs[name].step(batch, rate)
        if step % train.eval_every == 0 or step == train.steps:
            for name in ("mst", "short"):
                loss = mean_loss(runs[name].model, validation, length)
                runs[name].validation.append({"step": step, "loss": loss})
    difference = largest_difference(runs["mst"].losses, runs["vanilla"].losses)
    if not difference <= TOLERANCE:
        raise TrainingError(
            f"the losses of mst differ from those of vanilla by {difference:.1e} of the loss, more "
            f"than {TOLERANCE:g}"
        )
    advance("losses by position")
    final = list(fixed_batches(data.validation, 1, FINAL_SEQUENCES))
    return {
        "tokens_per_step": train.micro_batch_size * length,
        "long": length,
        "short": short,
        "parameters": sum(p.numel() for p in runs["mst"].model.parameters()),
        "largest_relative_difference": difference,
        "validation_sequences": len(validation),
        "final_sequences": len(final),
        "runs": {name: run.report() for name, run in runs.items()},
        "final": {name: _final(runs[name].model, final, length, short) for name in runs},
        "settings": asdict(config),
    }


class Run:
    """A model in training on batches cut into sequences of ``length``."""

    def __init__(self, config: Config, length: int) -> None:
        self._max_grad_norm = config.optimizer.max_grad_norm
        self._length = length
        self.model = build_model(
            config.model,
            policy=Policy.from_config(config.memory),
            attention=select_attention(config.kernel.attention, CPU, torch.float32),
            device=CPU,
            dtype=torch.float32,
            seed=config.train.seed,
        )
        optimizer = build_optimizer(self.model, config.optimizer, master_weights=False)
        self._engine = NativeEngine(self.model, optimizer)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validation: list[dict[str, Any]] = []

    def step(self, batch: Batch, rate: float) -> None:
        """Train on a batch, and note loss and time."""
        pieces = cut(batch, self._length)
        started = time.perf_counter()
        loss, *_ = train_step(self._engine, [pieces], rate, self._max_grad_norm)
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(loss)

    def report(self) -> dict[str, Any]:
        return {
            "sequence_length": self._length,
            "losses": self.losses,
            "step_seconds": self.seconds,
            "median_step_seconds": statistics.median(self.seconds),
            "validation": self.validation,
        }


def cut(batch: Batch, length: int) -> Batch:
    """The same tokens and labels in sequences of ``length``, each with positions from 0."""
    tokens, labels = (t.reshape(-1, length) for t in (batch.tokens, batch.labels))
    return Batch(tokens, labels, torch.arange(length).expand_as(tokens))


def token_losses(model: Transformer, batch: Batch, length: int) -> Tensor:
    """The loss of each token where sequences are cut to ``length``, in the batch's own shape."""
    pieces = cut(batch, length)
    losses = model.token_losses(pieces.tokens, pieces.labels, pieces.positions)
    return losses.view_as(batch.labels)


def mean_loss(model: Transformer, batches: Sequence[Batch], length: int) -> float:
    """The mean over all tokens."""
    return torch.cat([token_losses(model, b, length) for b in batches]).mean().item()


def largest_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Of losses at the same step, relative to the reference's."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def _final(model: Transformer, batches: Sequence[Batch], length: int, short: int) -> dict[str, Any]:
    """Losses with the full context and with a short one, and with the full one by position."""
    full = torch.cat([token_losses(model, b, length) for b in batches])
    return {
        "long": full.mean().item(),
        "short": mean_loss(model, batches, short),
        "by_position": full.unflatten(1, (-1, short)).mean((0, 2)).tolist(),
    }


def _in_turn(names: list[str], step: int) -> list[str]:
    """The names, each step beginning with another one."""
    first = step % len(names)
    return names[first:] + names[:first]
