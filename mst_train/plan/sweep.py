"""Predictions over sequence lengths."""

from collections.abc import Callable, Iterable

from mst_train.config import AUTO, Config
from mst_train.memory.simulate import with_length
from mst_train.plan.choose import choose
from mst_train.plan.predict import Prediction, Target, predict


def at_length(config: Config, target: Target, length: int) -> Prediction:
    """The prediction at a length; with memory.policy=auto that of the settings it chooses."""
    config = with_length(config, length)
    if config.memory.policy == AUTO:
        return choose(config, target).chosen
    return predict(config, target)


def over_lengths(
    config: Config, lengths: Iterable[int], target: Target, advance: Callable[[str], None]
) -> list[Prediction]:
    """Predictions at each of these lengths."""
    found = []
    for length in sorted(set(lengths)):
        advance(f"{length:,} tokens")
        found.append(at_length(config, target, length))
    return found
