"""One optimizer step by one process or by many: the same numbers either way.

Every process computes the loss of its own tokens, divided by the number of valid tokens of the
whole step, which all of them know before the first backward. The step's gradient is then the sum
over all processes and micro-batches, never a mean of means:

    valid_tokens = engine.topology.total([own valid tokens])
    engine.set_learning_rate(rate)
    for each micro-batch:
        loss_sum, _ = engine(tokens, labels, positions, documents)
        engine.backward(loss_sum / valid_tokens, last=...)
    norm = engine.gradient_norm()
    engine.clip(max_norm, norm)
    engine.step()

All processes make the same calls in the same order.

protocol    what every engine does
native      one process, or several with the whole model each
zero        ZeRO, by DeepSpeed
build       the engine that a configuration asks for
step        one optimizer step; the loss without one
positions   the validation loss by position in the sequence
"""

from mst_train.engine.build import (
    build_engine,
    check_engine,
    engine_problems,
    partition,
    whole_parameters,
)
from mst_train.engine.native import NativeEngine
from mst_train.engine.protocol import Engine

__all__ = [
    "Engine",
    "NativeEngine",
    "build_engine",
    "check_engine",
    "engine_problems",
    "partition",
    "whole_parameters",
]
