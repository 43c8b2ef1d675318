"""Two comparisons of training, measured on this machine with a small model.

For each seed a model begins on short sequences, in many small steps: that is how one this small
learns to copy soon. From its weights three runs go on and take each step in turn, with the same
tokens:

mst       sequences of full length, in mini-sequences
vanilla   the same sequences, everything kept: its losses have to be mst's
short     each sequence cut into short ones, in mini-sequences: what is lost is context alone
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mst_train.attention import select_attention
from mst_train.cli.compose import compose
from mst_train.config import Config
from mst_train.data import Batch, Data, Loader, fixed_batches, load_data
from mst_train.engine import NativeEngine
from mst_train.engine.step import train_step
from mst_train.errors import TrainingError
from mst_train.model import Policy, Transformer, build_model
from mst_train.optim import build_optimizer, learning_rate
from mst_train.paper import text
from mst_train.paper.spread import spread

Advance = Callable[[str], None]
Report = dict[str, Any]


@dataclass(frozen=True)
class Start:
    """How a model begins."""

    batches: int
    """Each as many tokens as a step of the runs that follow."""
    sequences: int
    """Short ones, in a step."""
    warmup_steps: int
    """After these the learning rate is constant."""


SETTINGS = (
    "run.name=paper_convergence",
    "data.sequence_length=4096",
    "model.hidden_size=128",
    "model.intermediate_size=352",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=4",
    "model.qk_norm=head",
    "model.sliding_window=64",
    "model.sliding_window_pattern=[sliding,full]",
    "memory.block_chunk_tokens=1024",
    "memory.mlp_chunk_tokens=512",
    "memory.head_chunk_tokens=512",
    "train.micro_batch_size=1",
    "train.steps=120",
    "train.eval_every=20",
    "train.eval_sequences=16",
    "optimizer.name=muon",
    "optimizer.learning_rate=2e-3",
    "optimizer.warmup_steps=0",
)
SHORT = 512
START = Start(batches=400, sequences=2, warmup_steps=50)
SEEDS = (0, 1, 2)
FINAL_SEQUENCES = 32
"""Validation sequences at the end."""

EXACT_STEPS = 20
"""Of each seed in float64 too, where rounding leaves room to see whether the method is exact; by
AdamW, since torch's Muon rounds its updates to bf16."""
TOLERANCE = 1e-9
"""How far, relative to the loss, the method's may be there from those with everything kept."""

CPU = torch.device("cpu")


def converge(advance: Advance) -> Report:
    """The comparisons at the scale of the page."""
    with text.prepared() as overrides:
        config = compose([*overrides, *SETTINGS])
        return {"text": text.name()} | compare(config, SHORT, START, SEEDS, advance)


def compare(
    config: Config, short: int, start: Start, seeds: Sequence[int], advance: Advance
) -> Report:
    """Losses, times and validation losses of the three runs of each seed, and what they say.

    Raises TrainingError where the method's losses are not those of keeping everything.
    """
    advance("reading the text")
    data = load_data(config.data)
    long = config.data.sequence_length
    found = [_compare(config, data, short, start, seed, advance) for seed in seeds]
    differences = [long_minus_short(one["final"]) for one in found]
    return {
        "tokens_per_step": config.train.micro_batch_size * long,
        "long": long,
        "short": short,
        "start": asdict(start),
        "parameters": found[0].pop("parameters"),
        "exact_steps": min(EXACT_STEPS, config.train.steps),
        "relative_difference": {
            name: max(one["relative_difference"][name] for one in found)
            for name in ("float64", "fp32")
        },
        "seeds": found,
        "long_minus_short": {
            name: spread([difference[name] for difference in differences])._asdict()
            for name in differences[0]
        },
        "settings": asdict(config),
    }


def long_minus_short(final: Report) -> dict[str, float]:
    """How much lower or higher the losses of the run on long sequences are, in nats."""
    long, short = final["mst"]["mean"], final["short"]["mean"]
    # Each with the context of its own training.
    at_long, at_short = (
        final[name]["by_position"][c] for name, c in (("mst", "long"), ("short", "short"))
    )
    return {
        "each with its own context": long["long"] - short["short"],
        "first positions": at_long[0] - at_short[0],
        "last positions": at_long[-1] - at_short[-1],
        "both with the long context": long["long"] - short["long"],
        "both with the short context": long["short"] - short["short"],
    }


def _compare(
    config: Config, data: Data, short: int, start: Start, seed: int, advance: Advance
) -> Report:
    """The runs of one seed."""
    config = replace(config, train=replace(config.train, seed=seed))
    train, long = config.train, config.data.sequence_length
    assert data.validation is not None
    loader = Loader(data.training, train.micro_batch_size, seed=seed)
    validation = list(fixed_batches(data.validation, 1, train.eval_sequences))
    vanilla = replace(config, memory=replace(config.memory, policy="vanilla"))
    advance(f"seed {seed}, the start")
    began = begin(config, loader, short, start)
    runs = {
        "mst": Run(config, long, began.model),
        "vanilla": Run(vanilla, long, began.model),
        "short": Run(config, short, began.model),
    }
    batches = [next(loader) for _ in range(train.steps)]
    exact = exact_difference((config, vanilla), began.model, batches[:EXACT_STEPS], advance)
    for name in ("mst", "short"):
        runs[name].validate(0, validation)
    for step, batch in enumerate(batches, 1):
        advance(f"seed {seed}, step {step} of {train.steps}")
        rate = learning_rate(step, train.steps, config.optimizer)
        for name in _in_turn(list(runs), step):
            runs[name].step(batch, rate)
        if step % train.eval_every == 0 or step == train.steps:
            for name in ("mst", "short"):
                runs[name].validate(step, validation)
    advance(f"seed {seed}, losses by position")
    final = list(fixed_batches(data.validation, 1, FINAL_SEQUENCES))
    return {
        "seed": seed,
        "parameters": sum(p.numel() for p in runs["mst"].model.parameters()),
        "relative_difference": {
            "float64": exact,
            "fp32": largest_difference(runs["mst"].losses, runs["vanilla"].losses),
        },
        "validation_sequences": len(validation),
        "final_sequences": len(final),
        "start": began.report(),
        "runs": {name: run.report() for name, run in runs.items()},
        "final": {
            name: final_losses(runs[name].model, final, long, short) for name in ("mst", "short")
        },
    }


def exact_difference(
    configs: Sequence[Config], start: Transformer, batches: Sequence[Batch], advance: Advance
) -> float:
    """Of two configurations' losses in float64 by AdamW, relative to the second's.

    Raises TrainingError where it is more than TOLERANCE.
    """
    losses = []
    for config in configs:
        config = replace(config, optimizer=replace(config.optimizer, name="adamw"))
        run = Run(config, config.data.sequence_length, start, torch.float64)
        for step, batch in enumerate(batches, 1):
            advance(f"float64, {config.memory.policy}, step {step} of {len(batches)}")
            run.step(batch, learning_rate(step, config.train.steps, config.optimizer))
        losses.append(run.losses)
    difference = largest_difference(*losses)
    if not difference <= TOLERANCE:
        raise TrainingError(
            f"in float64 the losses of mst differ from those of vanilla by {difference:.1e} of the "
            f"loss, more than {TOLERANCE:g}"
        )
    return difference


def begin(config: Config, loader: Loader, short: int, start: Start) -> "Run":
    """A model that has trained on the loader's next batches, cut into short sequences."""
    settings = replace(config.optimizer, schedule="constant", warmup_steps=start.warmup_steps)
    run, step = Run(config, short), 0
    for _ in range(start.batches):
        pieces = cut(next(loader), short)
        parts = (t.split(start.sequences) for t in (pieces.tokens, pieces.labels, pieces.positions))
        for part in zip(*parts, strict=True):
            step += 1
            run.step(Batch(*part), learning_rate(step, step, settings))
    return run


class Run:
    """A model in training on batches cut into sequences of ``length``."""

    def __init__(
        self,
        config: Config,
        length: int,
        start: Transformer | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``start``: the model whose weights it begins with; None: those of the seed."""
        self._max_grad_norm = config.optimizer.max_grad_norm
        self._length = length
        self.model = build_model(
            config.model,
            policy=Policy.from_config(config.memory),
            attention=select_attention(config.kernel.attention, CPU, dtype),
            device=CPU,
            dtype=dtype,
            seed=config.train.seed,
        )
        if start is not None:
            self.model.load_state_dict(start.state_dict())
        optimizer = build_optimizer(self.model, config.optimizer, master_weights=False)
        self._engine = NativeEngine(self.model, optimizer)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validation: list[Report] = []

    def step(self, batch: Batch, rate: float) -> None:
        """Train on a batch, and note loss and time."""
        pieces = cut(batch, self._length)
        started = time.perf_counter()
        loss, *_ = train_step(self._engine, [pieces], rate, self._max_grad_norm)
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(loss)

    def validate(self, step: int, batches: Sequence[Batch]) -> None:
        """Note the loss on held-out text, cut as the run's own."""
        loss = mean_loss(self.model, batches, self._length)
        self.validation.append({"step": step, "loss": loss})

    def report(self) -> Report:
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


def final_losses(model: Transformer, batches: Sequence[Batch], long: int, short: int) -> Report:
    """Losses with the context of the long sequences and of the short ones.

    By position: at each ``short`` places of a long sequence, from the first on, with either.
    """
    found = {
        name: torch.cat([token_losses(model, batch, length) for batch in batches])
        for name, length in (("long", long), ("short", short))
    }
    return {
        "mean": {name: losses.mean().item() for name, losses in found.items()},
        "by_position": {
            name: losses.unflatten(1, (-1, short)).mean((0, 2)).tolist()
            for name, losses in found.items()
        },
    }


def _in_turn(names: list[str], step: int) -> list[str]:
    """The names, each step beginning with another one."""
    first = step % len(names)
    return names[first:] + names[:first]
