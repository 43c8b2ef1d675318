"""What python -m mst_train.plan reads beside the settings of a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mst_train.cli.compose import compose_as
from mst_train.config import AUTO, Config
from mst_train.config.rules import at_least
from mst_train.config.schema import MOST_TOKENS, choice
from mst_train.engine import engine_problems
from mst_train.errors import UserError
from mst_train.memory.devices import find_device
from mst_train.plan.predict import Target, make_target


@dataclass(frozen=True)
class PlanSettings:
    """What python -m mst_train.plan predicts; the run it is about are all other settings."""

    device: str = AUTO
    """A device's name (a100_80gb, h100_80gb, h200, rtx4090_24gb, ...), a size in GiB such as 80,
    cpu, or auto: this machine's."""
    gpus: int | None = None
    """How many devices share the run; null: parallel.sequence_parallel."""
    gpus_per_node: int = 8
    """How many of them a machine has."""
    search: bool = False
    """Find the longest sequence that fits, in multiples of 1024."""
    sweep: list[int] = field(default_factory=list)
    """Sequence lengths to predict, for a table and a plot of memory against length."""
    dir: str = "runs/plan/${run.name}"
    """Where a sweep's table and plot go."""
    output: str = choice("table", ("table", "json"))
    """What is printed. table: a readable one. json: one JSON object."""


@dataclass(frozen=True)
class PlanConfig(Config):
    plan: PlanSettings = field(default_factory=PlanSettings)


def read(arguments: Sequence[str]) -> PlanConfig:
    """The configuration that the arguments make; UserError with every problem found."""
    return compose_as(PlanConfig, arguments, _problems)


def configured_target(config: PlanConfig) -> Target:
    """The device and the number of them that ``plan`` names.

    Raises UserError for an unknown device, or one that cannot hold the weights at all, and where
    so many could not train as configured.
    """
    problems = [*engine_problems(config, config.plan.gpus or config.parallel.sequence_parallel)]
    if problems:
        raise UserError(problems)
    device = find_device(config.plan.device)
    here = config.plan.device in (AUTO, "cpu")
    plan = config.plan
    return make_target(config, device, plan.gpus, here=here, per_machine=plan.gpus_per_node)


def _problems(config: PlanConfig) -> Iterator[str]:
    plan = config.plan
    for length in plan.sweep:
        yield from at_least("plan.sweep", length, 2, MOST_TOKENS - 1)
    yield from at_least("plan.gpus_per_node", plan.gpus_per_node, 1)
    if plan.gpus is not None:
        yield from at_least("plan.gpus", plan.gpus, 1)
        if plan.gpus % config.parallel.sequence_parallel:
            yield (
                f"plan.gpus={plan.gpus} is not a multiple of parallel.sequence_parallel="
                f"{config.parallel.sequence_parallel}"
            )
