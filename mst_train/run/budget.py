"""How long a run is: train.tokens in optimizer steps."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mst_train.config import Config

log = logging.getLogger(__name__)


def with_steps(config: Config, progress: Mapping[str, Any], data_parallel: int) -> Config:
    """The configuration with the steps that train.tokens comes to; as it is where that is null.

    Args:
        progress: the ``step`` and the ``tokens`` that the run has come to, however many processes
            it had until then.
        data_parallel: groups of processes that read different samples from now on.
    """
    train = config.train
    if train.tokens is None:
        return config
    sequences = train.micro_batch_size * train.accumulation_steps * data_parallel
    tokens = sequences * config.data.sequence_length
    missing = max(train.tokens - progress["tokens"], 0)
    steps = progress["step"] + -(-missing // tokens)
    log.info(
        "train.tokens=%s: the run ends after step %s, with %s tokens in a step",
        *(f"{number:,}" for number in (train.tokens, steps, tokens)),
    )
    return replace(config, train=replace(train, steps=steps))
