"""memory.policy=auto: the fastest settings that fit, as predicted.

The choice is among settings that give the same result. Plain recomputation is not among them: the
mini-sequence policy takes less memory and less time at every length.

Settings are tried in groups, and a group is looked at where nothing before it fits: with the
configured optimizer; each parameter updated in the backward, where neither clipping nor
accumulation forbids it; the optimizer on the host; and small chunks.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mst_train.config import AUTO, Config
from mst_train.errors import UserError
from mst_train.memory.simulate import Build, with_length
from mst_train.plan.predict import Prediction, Target, predict
from mst_train.plan.search import STEP, longest_fitting
from mst_train.units import GIB

SMALL_BLOCK_CHUNK = 1024


@dataclass(frozen=True)
class Choice:
    """What was chosen, and all that was compared."""

    chosen: Prediction
    compared: list[Prediction]

    @property
    def reason(self) -> str:
        """One line: what was chosen and why."""
        chosen = self.chosen
        parts = [f"memory.policy=auto chose {describe(chosen)}: {_figures(chosen)}"]
        for why, fits in (("slower", True), ("too large", False)):
            others = [p for p in self.compared if p is not chosen and p.fits == fits]
            if others:
                names = ", ".join(f"{describe(p)} ({_figures(p)})" for p in others)
                parts.append(f"{why}: {names}")
        return "; ".join(parts)


def choose(
    config: Config, target: Target, advance: Callable[[str], None] = lambda _: None
) -> Choice:
    """The fastest settings of ``config`` that fit ``target``.

    advance: hears of each prediction that is made.

    Raises UserError with the nearest settings that work where none fits.
    """
    compared: list[Prediction] = []
    for group in settings(config, target.gpus):
        found = []
        for candidate in group:
            prediction = predict(candidate, target)
            advance(describe(prediction))
            found.append(prediction)
        compared += found
        fitting = [prediction for prediction in found if prediction.fits]
        if fitting:
            return Choice(min(fitting, key=_cost), compared)
    raise UserError(_nothing_fits(config, target, compared))


def leanest(config: Config, gpus: int = 1) -> list[Config]:
    """Of the settings to choose from, those that can reach the longest sequences."""
    last = list(settings(config, gpus))[-1]
    keeping = any(c.memory.keep_attention for c in last)
    return [c for c in last if not (keeping and c.memory.keep_attention)]


def describe(prediction: Prediction) -> str:
    """The settings that were chosen, as one would name them."""
    memory, optimizer = prediction.config.memory, prediction.config.optimizer
    words = [memory.policy]
    if memory.policy == "mst" and not memory.keep_attention:
        words.append("attention computed again")
    if memory.offload != "none":
        words.append("offloaded to the host")
    if optimizer.in_backward:
        words.append("updates in the backward")
    if optimizer.offload != "none":
        words.append("optimizer on the host")
    return ", ".join(words)


def _cost(prediction: Prediction) -> tuple[float, float]:
    seconds = prediction.seconds
    if seconds is None:  # unknown rates: the least work, then the fewest copies
        work = prediction.simulation.work
        return work.flops, work.link_bytes
    return seconds, prediction.simulation.peak_bytes


def settings(config: Config, gpus: int = 1) -> Iterator[list[Config]]:
    """What to choose from, in groups: a later one where nothing of those before fits.

    gpus: how many processes train; the optimizers of several go to their hosts with ZeRO alone.
    """
    optimizer = config.optimizer
    yield _policies(config)
    in_backward = config
    if (
        not optimizer.in_backward
        and optimizer.max_grad_norm is None
        and optimizer.offload == "none"
        and config.train.accumulation_steps == 1
        and config.parallel.zero_stage == 0
    ):
        in_backward = replace(config, optimizer=replace(optimizer, in_backward=True))
        yield _policies(in_backward)
    host_works = gpus == 1 or config.parallel.zero_stage > 0
    if optimizer.offload == "none" and config.precision != "bf16" and host_works:
        on_host = replace(optimizer, in_backward=False, offload="host")
        yield _policies(replace(config, optimizer=on_host))
    if config.memory.block_chunk_tokens == AUTO:
        small = replace(in_backward.memory, block_chunk_tokens=SMALL_BLOCK_CHUNK)
        candidates = _policies(replace(in_backward, memory=small))
        yield [c for c in candidates if c.memory.policy == "mst"]


def _policies(config: Config) -> list[Config]:
    """The memory settings that "auto" may take, the rest as configured."""

    def with_memory(**changes: Any) -> Config:
        return replace(config, memory=replace(config.memory, **changes))

    offloads = ["host"] if config.memory.offload == "host" else ["none", "host"]
    keeps = [True, False] if config.memory.keep_attention else [False]
    plain = [with_memory(policy="vanilla")] if "none" in offloads else []
    return plain + [
        with_memory(policy="mst", keep_attention=keep, offload=offload)
        for offload in offloads
        for keep in keeps
    ]


def _figures(prediction: Prediction) -> str:
    peak = f"{prediction.simulation.peak_bytes / GIB:.2f} GiB"
    if prediction.simulation.host_bytes:
        peak += f" and {prediction.simulation.host_bytes / GIB:.2f} GiB of the host"
    seconds = prediction.seconds
    return peak if seconds is None else f"{peak}, {seconds:.3g} s"


def _nothing_fits(config: Config, target: Target, compared: list[Prediction]) -> str:
    least = min(compared, key=lambda p: p.simulation.peak_bytes)
    host = target.host_budget_bytes
    has = f"{target.budget_bytes / GIB:.2f} GiB of device memory"
    if host is not None:
        has += f" and {host / GIB:.2f} GiB of host memory"
    text = (
        f"no setting of memory.policy=auto fits {has} at "
        f"data.sequence_length={config.data.sequence_length}: the leanest ({describe(least)}) "
        f"needs {_figures(least)}. "
    )
    nearest = longest(config, target)
    if nearest is None:
        return text + "No shorter sequence fits either: take a larger device or a smaller model"
    return text + (
        f"The nearest that fits: data.sequence_length={nearest.config.data.sequence_length} with "
        f"{describe(nearest)}"
    )


def longest(
    config: Config,
    target: Target,
    advance: Callable[[str], None] = lambda _: None,
    *,
    build: Build | None = None,
    step: int = STEP,
) -> Prediction | None:
    """The prediction at the longest sequence that fits, a multiple of ``step``; None: none does.

    With memory.policy=auto, by the leanest settings that it may choose. build: makes the model,
    where it is not the decoder of this project.
    """
    candidates = leanest(config, target.gpus) if config.memory.policy == AUTO else [config]
    step = math.lcm(step, config.parallel.sequence_parallel)

    def reach(candidate: Config) -> Prediction | None:
        known: dict[int, Prediction] = {}

        def excess(length: int) -> int:
            advance(f"{length:,} tokens")
            known[length] = predict(with_length(candidate, length), target, build)
            return known[length].shortage_bytes

        length = longest_fitting(excess, step=step)
        return None if length is None else known[length]

    fitting = [prediction for prediction in map(reach, candidates) if prediction is not None]
    return max(fitting, key=lambda p: p.config.data.sequence_length, default=None)


def at_length(config: Config, target: Target, length: int) -> Prediction:
    """The prediction at a length; with memory.policy=auto that of the settings it chooses."""
    config = with_length(config, length)
    if config.memory.policy == AUTO:
        return choose(config, target).chosen
    return predict(config, target)


def over_lengths(
    config: Config, lengths: Iterable[int], target: Target, advance: Callable[[str], None]
) -> list[Prediction]:
    """Predictions at each of these lengths, in their order."""
    found = []
    for length in sorted(set(lengths)):
        advance(f"{length:,} tokens")
        found.append(at_length(config, target, length))
    return found
