"""What python -m mst_train.bench reads beside the settings of a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mst_train.cli.compose import compose_as
from mst_train.config import Config
from mst_train.config.rules import at_least
from mst_train.config.schema import MOST_PROCESSES, MOST_TOKENS, choice
from mst_train.errors import UserError

BENCHES = ("none", "step", "systems", "peers", "short", "max_sequence")


@dataclass(frozen=True)
class BenchSettings:
    """What python -m mst_train.bench measures; dimensions and type are the model's settings."""

    kind: str = choice("none", BENCHES)
    """step: memory policies. systems: other implementations of whole steps. peers: other
    implementations of the head and the MLP. short: what the method costs where it is not needed.
    max_sequence: the longest sequences that fit, and what was predicted."""
    name: str = "${bench.kind}"
    """What the results are called."""
    dir: str = "runs/bench/${bench.name}"
    """The folder that results are written to."""
    output: str = choice("table", ("table", "json"))
    """What is printed. table: a readable one. json: one JSON object."""
    lengths: list[int] = field(default_factory=list)
    """Tokens in a sequence (peers: tokens), each measured; empty: data.sequence_length."""
    variants: list[str] = field(default_factory=list)
    """What to compare, by the names in the results; empty: everything."""
    repetitions: int = 3
    """Measurements of each, of which the median counts."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    optimizer: bool = False
    """Make AdamW's step (at a learning rate of zero) part of the step."""
    loss_tile_mib: int = 1024
    """DeepSpeed's tiled loss: MiB of fp32 logits in a tile (ArcticTraining's: 1024)."""


@dataclass(frozen=True)
class BenchConfig(Config):
    bench: BenchSettings = field(default_factory=BenchSettings)


def read(arguments: Sequence[str]) -> BenchConfig:
    """The configuration that the arguments make; UserError with every problem found."""
    config = compose_as(BenchConfig, arguments, _problems)
    given = [a for a in arguments if a.lstrip("+").startswith("data.sequence_length=")]
    if given and config.bench.lengths:
        raise UserError(
            f"{given[-1].lstrip('+')} has no effect: the bench measures bench.lengths="
            f"{config.bench.lengths}: set that instead"
        )
    return config


def _problems(config: BenchConfig) -> Iterator[str]:
    bench = config.bench
    yield from at_least("bench.repetitions", bench.repetitions, 1)
    yield from at_least("bench.loss_tile_mib", bench.loss_tile_mib, 1)
    if bench.threads is not None:
        yield from at_least("bench.threads", bench.threads, 1, MOST_PROCESSES)
    for length in bench.lengths:
        yield from at_least("bench.lengths", length, 2, MOST_TOKENS - 1)
