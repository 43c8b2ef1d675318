"""memory.policy=auto: the fastest settings that fit, as predicted."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

from mst_train.config import ALL, AUTO, Config
from mst_train.errors import UserError
from mst_train.memory.extrapolate import with_length
from mst_train.memory.simulated_step import Build
from mst_train.mst import ATTENTION
from mst_train.plan import buckets
from mst_train.plan.candidates import leanest, levers, settings
from mst_train.plan.keep import fill
from mst_train.plan.predict import Prediction, Target, predict
from mst_train.plan.search import STEP, longest_fitting
from mst_train.units import GIB, duration

OFFLOAD_MARGIN = 0.05
"""So much faster has to be what is offloaded, where it would fit otherwise: the host's memory and
its link may have other users."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and all that was compared."""

    chosen: Prediction
    compared: list[Prediction]

    @property
    def reason(self) -> str:
        """What was chosen and what else was looked at, a line each."""
        rows = [
            (describe(p), _figures(p), "chosen" if p is self.chosen else _verdict(p))
            for p in sorted(self.compared, key=lambda p: p is not self.chosen)
        ]
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, wide)).rstrip() for row in rows]
        return "\n  ".join(["memory.policy=auto:", *lines])


def choose(
    config: Config, target: Target, advance: Callable[[str], None] = lambda _: None
) -> Choice:
    """The fastest settings of ``config`` that fit ``target``.

    advance: hears of each prediction that is made.

    Raises UserError with the nearest settings that work where none fits.
    """
    compared: list[Prediction] = []

    def predicted(candidate: Config) -> Prediction:
        prediction = predict(candidate, target)
        advance(describe(prediction))
        compared.append(prediction)
        return prediction

    for group in settings(config, target.gpus):
        if not _may_fit(group, target):
            continue
        fitting = [found for found in map(predicted, group) if found.fits]
        on_device = [found for found in fitting if _may_keep_more(found)]
        if on_device:
            lean = min(on_device, key=lambda found: found.simulation.peak_bytes)
            more = fill(lean, config.memory.keep, predicted)
            fitting += [more] if more else []
        if fitting:
            return Choice(min(fitting, key=_cost), compared)
    raise UserError(_nothing_fits(config, target, compared, advance))


def _may_fit(group: list[Config], target: Target) -> bool:
    """Whether a group's leanest settings fit at a length that takes little time to predict."""
    short = math.lcm(STEP, group[0].parallel.sequence_parallel)
    if group[0].data.sequence_length <= short:
        return True
    last = {candidate.memory.offload: candidate for candidate in group}
    return any(predict(with_length(some, short), target).fits for some in last.values())


def describe(prediction: Prediction) -> str:
    """The settings that were chosen, as one would name them."""
    memory, optimizer = prediction.config.memory, prediction.config.optimizer
    words = [memory.policy]
    if memory.policy == "mst":
        words += _kept(prediction)
    if memory.offload != "none":
        words.append("offloaded to the host")
    if optimizer.in_backward:
        words.append("updates in the backward")
    if optimizer.offload != "none":
        words.append("optimizer on the host")
    return ", ".join(words)


def described(prediction: Prediction) -> str:
    """The settings that were chosen, and what they take."""
    return f"{describe(prediction)}: {_figures(prediction)}"


def _may_keep_more(prediction: Prediction) -> bool:
    memory = prediction.config.memory
    return memory.policy == "mst" and memory.offload == "none"


def _kept(prediction: Prediction) -> list[str]:
    """What blocks keep, where it is not attention's result alone."""
    layers = prediction.config.model.num_layers
    counts = prediction.simulation.policy.keep
    kept = {n: layers if c == ALL else min(int(c), layers) for n, c in counts.items() if c}
    if kept == {ATTENTION: layers}:
        return []
    again = [] if ATTENTION in kept else ["attention computed again"]
    names = [n if c == layers else f"{n} in {c} of {layers} blocks" for n, c in kept.items()]
    return again + ([f"keeping {', '.join(names)}"] if names else [])


def _cost(prediction: Prediction) -> tuple[float, float]:
    seconds, found = prediction.seconds, prediction.simulation
    if seconds is None:  # unknown rates: the least work, then the fewest copies
        return found.work.flops, found.work.link_bytes
    if prediction.config.memory.offload != "none":
        seconds *= 1 + OFFLOAD_MARGIN
    one_memory = prediction.target.device.kind == "cpu"
    return seconds, found.peak_bytes + (found.host_bytes if one_memory else 0)


def _verdict(prediction: Prediction) -> str:
    return "slower" if prediction.fits else "too large"


def _figures(prediction: Prediction) -> str:
    seconds, sizes = prediction.seconds, _sizes(prediction)
    return sizes if seconds is None else f"{sizes}, {duration(seconds)}"


def _sizes(prediction: Prediction) -> str:
    peak, host = prediction.simulation.peak_bytes, prediction.simulation.host_bytes
    if prediction.target.device.kind == "cpu":  # one memory for both
        return f"{(peak + host) / GIB:.2f} GiB"
    return f"{peak / GIB:.2f} GiB" + (f" and {host / GIB:.2f} GiB of the host" if host else "")


def _nothing_fits(
    config: Config, target: Target, compared: list[Prediction], advance: Callable[[str], None]
) -> str:
    host = None if target.device.kind == "cpu" else target.host_budget_bytes
    has = f"{target.budget_bytes / GIB:.2f} GiB of device memory"
    if host is not None:
        has += f" and {host / GIB:.2f} GiB of host memory"
    text = (
        f"no setting of memory.policy=auto fits {has} at "
        f"data.sequence_length={config.data.sequence_length}"
    )
    if compared:
        least = min(compared, key=lambda p: p.shortage_bytes)
        text += f": the leanest ({describe(least)}) needs {_sizes(least)}"
    nearest = longest(config, target, advance) if compared else None
    if nearest is None:
        ways = ["No shorter sequence fits either"]
    else:
        ways = [
            f"The nearest that fits: data.sequence_length={nearest.config.data.sequence_length} "
            f"with {describe(nearest)}"
        ]

    def fitting(other: Config) -> Prediction | None:
        return _first_fitting(other, target, advance)

    bucket = buckets.largest(config, target.gpus, fitting)
    others = [(words, fitting(other)) for words, other in levers(config, target.gpus)]
    for words, found in [*([bucket] if bucket else []), *others]:
        if found is not None:
            ways.append(f"It fits with {words}: {describe(found)}, {_figures(found)}")
    if nearest is None and len(ways) == 1:
        more = " or host" if host is not None else ""
        ways[0] += f": take a larger device{more}, or a smaller model"
    return ". ".join([text, *ways])


def _first_fitting(
    config: Config, target: Target, advance: Callable[[str], None]
) -> Prediction | None:
    """The first of the settings to choose from that fit."""
    groups = (group for group in settings(config, target.gpus) if _may_fit(group, target))
    for candidate in chain.from_iterable(groups):
        prediction = predict(candidate, target)
        advance(describe(prediction))
        if prediction.fits:
            return prediction
    return None


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
