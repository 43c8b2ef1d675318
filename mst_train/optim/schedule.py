"""The learning rate of each step.

It depends on the step, the run's length and the settings alone: a run may go on from any checkpoint
with another length or schedule.
"""

import math

from mst_train.config import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The learning rate of step ``step`` (1 to ``steps``), as optimizer.schedule has it.

    Where a warm-up and the decay of wsd overlap, the lower of the two.
    """
    highest, floor = config.learning_rate, config.min_learning_rate_ratio
    rate = highest
    if step <= config.warmup_steps:
        rate = highest * step / config.warmup_steps
    elif config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        rate = highest * (floor + (1 - floor) * cosine)
    decay = decay_steps(steps, config)
    if step > steps - decay:
        rate = min(rate, highest * (floor + (1 - floor) * (steps - step) / decay))
    return rate


def decay_steps(steps: int, config: OptimizerConfig) -> int:
    """Steps at the end of a run of ``steps`` that are wsd's decay; 0 in other schedules."""
    if config.schedule != "wsd":
        return 0
    return (steps + 5) // 10 if config.decay_steps is None else config.decay_steps


def too_short(steps: int, config: OptimizerConfig) -> str | None:
    """What of its schedule a run of ``steps`` has no room for; None where it has."""
    decay = decay_steps(steps, config)
    if config.warmup_steps + decay <= steps:
        return None
    parts = f"optimizer.warmup_steps={config.warmup_steps}"
    if decay:
        parts += f" and the decay of {decay} (optimizer.decay_steps)"
    return (
        f"the run's {steps} steps are fewer than {parts}: it does not get to "
        f"optimizer.learning_rate={config.learning_rate:g}"
    )
