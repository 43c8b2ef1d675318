"""How fast a device does the work of a step.

For devices elsewhere: the makers' rates times the shares below, which are assumed from what others
have published for such kernels; not yet measured here. For this machine's CPU: measured, in about
a second, the first time it is asked for.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mst_train.attention.select import CpuKernel
from mst_train.memory.counter import LARGE_BYTES, attention_flops
from mst_train.memory.devices import Device
from mst_train.memory.simulate import Simulation

PRODUCT_SHARE = 0.70
ATTENTION_FORWARD_SHARE = 0.60
ATTENTION_BACKWARD_SHARE = 0.50
MEMORY_SHARE = 0.80
"""Of the makers' rates for bf16 products and memory."""

HOST_MEMORY_RATE = 100e9
"""Bytes per second that the host's AdamW reads and writes. Assumed."""

KEPT_BYTES = 2 * LARGE_BYTES
GIVEN_BACK_SHARE = 0.5
"""What a CPU's allocator (glibc's) keeps of the memory that a step leaves free at its end, and how
often it gives back the rest, to be taken anew in the next step: about every other time, by what
happens to lie on top. Measured on two cores."""

NEW_PAGES_RATE = 0.7e9
"""Bytes per second of pages that a CPU's system has to find. Measured in steps on two cores of a
virtual machine. Not measured anew, because a trial sees pages that were given back a moment ago,
which come up to six times as fast."""

ROUNDS = 9
ROUNDS_SECONDS = 1.0
"""How often each of a CPU's rates is measured; the median counts. No round begins after the
seconds, which a CPU without instructions for bf16 needs for few tokens."""

FEW_TOKENS, MANY_TOKENS = 64, 1024
"""A CPU's rates are measured at many tokens where all rounds at few were quick enough."""


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second.

    large: bytes of new pages from the system; None where they cost nothing. source: where the
    numbers are from.
    """

    products: float
    attention_forward: float
    attention_backward: float
    memory: float
    link: float
    large: float | None
    source: str


def rates(device: Device, dtype: torch.dtype) -> Rates | None:
    """A device's rates; None where they are not known."""
    if device.kind == "cpu":
        return _measured(dtype, torch.get_num_threads())
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


def seconds(found: Simulation, rates: Rates) -> float:
    """A step's time: computing, with copies to and from the host beside it; the host's AdamW after.

    Copies go both ways at once, half of them in each direction.
    """
    work = found.work
    computing = (
        work.product_flops / rates.products
        + work.attention_forward_flops / rates.attention_forward
        + work.attention_backward_flops / rates.attention_backward
        + work.memory_bytes / rates.memory
    )
    if rates.large:
        given_back = max(found.passing_bytes - KEPT_BYTES, 0) * GIVEN_BACK_SHARE
        computing += (work.large_bytes + given_back) / rates.large
    copying = work.link_bytes / 2 / rates.link
    return max(computing, copying) + work.host_memory_bytes / HOST_MEMORY_RATE


@functools.cache
def _measured(dtype: torch.dtype, threads: int) -> Rates:
    started = time.perf_counter()
    rates = _trial(dtype, threads, FEW_TOKENS)
    slow = time.perf_counter() - started > ROUNDS_SECONDS
    return rates if slow else _trial(dtype, threads, MANY_TOKENS)


def _trial(dtype: torch.dtype, threads: int, tokens: int) -> Rates:
    left, right = torch.ones(tokens, 512, dtype=dtype), torch.ones(512, 2048, dtype=dtype)
    q = torch.ones(1, tokens, 8, 64, dtype=dtype)
    kernel = CpuKernel()
    out, lse = kernel.forward(q, q, q)
    small = torch.ones(2**20)
    seconds = _median_seconds(
        product=lambda: left @ right,
        forward=lambda: kernel.forward(q, q, q),
        backward=lambda: kernel.backward(q, q, q, q, out, lse),
        memory=lambda: torch.add(small, 1.0, out=small).mul_(1.0),
    )
    flops = attention_flops(q, q, causal=True)
    memory = 3 * small.nbytes / seconds["memory"]
    return Rates(
        products=2 * left.numel() * right.shape[1] / seconds["product"],
        attention_forward=flops / seconds["forward"],
        attention_backward=2.5 * flops / seconds["backward"],
        memory=memory,
        link=memory,
        large=NEW_PAGES_RATE,
        source=f"measured on this machine's CPU with {threads} threads",
    )


def _median_seconds(**runs: Callable[[], object]) -> dict[str, float]:
    """The median seconds of each of ``runs``, all in turn, so that a busy moment spoils none."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    for _ in range(ROUNDS):
        if any(times.values()) and time.perf_counter() - begun > ROUNDS_SECONDS:
            break
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(measured) for name, measured in times.items()}
