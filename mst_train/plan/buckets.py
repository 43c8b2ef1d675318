"""ZeRO's buckets of gradients: whether a step fits with smaller ones, which cost messages alone."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from mst_train.config import Config
from mst_train.engine.zero import reduce_bucket_size
from mst_train.plan.predict import Prediction, Target, predict

SIZES = (10**6, 10**7, 10**8)
"""Elements in a bucket, to try."""

MOST_BYTES = 16
"""What an element of a bucket takes at most, in fp32: in two buckets, in the copy that is summed,
and in a gradient that waits for its bucket to be full."""


def that_fits(config: Config, target: Target, shortage_bytes: int) -> tuple[str, Prediction] | None:
    """As ``largest``, of a step as it is configured that is ``shortage_bytes`` too large."""
    if shortage_bytes > MOST_BYTES * _size(config):
        return None

    def fitting(other: Config) -> Prediction | None:
        prediction = predict(other, target)
        return prediction if prediction.fits else None

    return largest(config, target.gpus, fitting)


def largest(
    config: Config, gpus: int, fitting: Callable[[Config], Prediction | None]
) -> tuple[str, Prediction] | None:
    """The setting of the largest buckets, smaller than those configured, with which a step fits.

    fitting: the prediction of what fits with a configuration; None where nothing does.

    Returns the setting as it is typed with its prediction; None where none is enough, or where
    there are no buckets.
    """
    found = None
    for words, other in _smaller(config, gpus):
        prediction = fitting(other)
        if prediction is None:
            break
        found = words, prediction
    return found


def _smaller(config: Config, gpus: int) -> Iterator[tuple[str, Config]]:
    parallel = config.parallel
    summed_whole = parallel.zero_stage == 1 and config.precision == "bf16_master"
    if gpus == 1 or parallel.zero_stage == 0 or summed_whole:
        return
    for size in SIZES:
        if size < _size(config):
            zero = {**parallel.deepspeed.get("zero_optimization", {}), "reduce_bucket_size": size}
            deepspeed = {**parallel.deepspeed, "zero_optimization": zero}
            words = f"parallel.deepspeed.zero_optimization.reduce_bucket_size={size}"
            yield words, replace(config, parallel=replace(parallel, deepspeed=deepspeed))


def _size(config: Config) -> int:
    zero = config.parallel.deepspeed.get("zero_optimization", {})
    return int(zero.get("reduce_bucket_size", reduce_bucket_size(config.model)))
