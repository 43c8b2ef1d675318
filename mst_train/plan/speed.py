"""The time of a step: its work over the rates of a device."""

from mst_train.memory.counter import LARGE_BYTES
from mst_train.memory.simulate import Simulation
from mst_train.plan.trial import Rates

HOST_MEMORY_RATE = 100e9
"""Bytes per second that the host's AdamW reads and writes. Assumed."""

KEPT_BYTES = 2 * LARGE_BYTES
GIVEN_BACK_SHARE = 0.5
"""What a CPU's allocator (glibc's) keeps of the memory that a step leaves free at its end, and how
often it gives back the rest, to be taken anew in the next step: about every other time, by what
happens to lie on top. Measured on two cores."""


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
