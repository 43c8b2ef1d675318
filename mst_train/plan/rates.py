"""How fast devices do what a step does.

this machine's CPU   measured in about a second, the first time it is asked for
GPUs                 as ``python -m mst_train.plan.trial FILE`` has measured one: in the file
                     that MST_TRAIN_RATES names, or rates.json beside this module; else the
                     makers' rates times the shares below, which are assumed from what others
                     have published for such kernels
"""

import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from mst_train.errors import UserError
from mst_train.files import reading
from mst_train.memory.devices import Device, known_as
from mst_train.plan.trial import FEW_TOKENS, MANY_TOKENS, ROUNDS_SECONDS, Rates, measure

PRODUCT_SHARE = 0.70
ATTENTION_FORWARD_SHARE = 0.60
ATTENTION_BACKWARD_SHARE = 0.50
MEMORY_SHARE = 0.80
"""Of the makers' rates for bf16 products and memory."""

FILE_VARIABLE = "MST_TRAIN_RATES"


def rates(device: Device, dtype: torch.dtype) -> Rates | None:
    """A device's rates; None where they are not known.

    Raises UserError where the file of rates cannot be read.
    """
    if device.kind == "cpu":
        return _of_this_cpu(dtype, torch.get_num_threads())
    for name, found in _in_file(os.environ.get(FILE_VARIABLE)).items():
        if device.name in (name, known_as(name)):
            return found
    if not (device.bf16_flops and device.memory_rate and device.link_rate):
        return None
    flops = device.bf16_flops
    return Rates(
        products=flops * PRODUCT_SHARE,
        attention_forward=flops * ATTENTION_FORWARD_SHARE,
        attention_backward=flops * ATTENTION_BACKWARD_SHARE,
        memory=device.memory_rate * MEMORY_SHARE,
        link=device.link_rate,
        large=None,
        source=(
            f"assumed: {PRODUCT_SHARE:.0%} of the bf16 peak in products, "
            f"{ATTENTION_FORWARD_SHARE:.0%} and {ATTENTION_BACKWARD_SHARE:.0%} in attention's "
            f"forward and backward, {MEMORY_SHARE:.0%} of the memory's rate"
        ),
    )


@functools.cache
def _in_file(named: str | None) -> dict[str, Rates]:
    """Measured rates by the names that torch gives devices."""
    path = Path(named) if named else Path(__file__).with_name("rates.json")
    if not named and not path.exists():
        return {}
    with reading(f"{FILE_VARIABLE}={path}", "name a file that mst_train.plan.trial has written"):
        text = path.read_bytes()
    try:
        return {name: _checked(entry["rates"]) for name, entry in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} has no rates of devices ({type(error).__name__}: {error}): have "
            f"python -m mst_train.plan.trial {path} write it on a machine with one"
        ) from error


def _checked(values: dict[str, Any]) -> Rates:
    found = Rates(**values)
    numbers = {name: value for name, value in values.items() if name not in ("large", "source")}
    wrong = [f"{name}={value}" for name, value in numbers.items() if not float(value) > 0]
    if wrong:
        raise ValueError(", ".join(wrong))
    return found


@functools.cache
def _of_this_cpu(dtype: torch.dtype, threads: int) -> Rates:
    cpu = torch.device("cpu")
    started = time.perf_counter()
    found = measure(cpu, dtype, FEW_TOKENS)
    slow = time.perf_counter() - started > ROUNDS_SECONDS
    return found if slow else measure(cpu, dtype, MANY_TOKENS)
