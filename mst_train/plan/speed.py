"""The time of a step: its work over the rates of a device."""

from mst_train.memory.counter import LARGE_BYTES, Work
from mst_train.memory.devices import Device
from mst_train.memory.simulate import Simulation
from mst_train.plan.trial import Rates

HOST_MEMORY_RATE = 100e9
"""Bytes per second that the host's AdamW reads and writes. Assumed."""

NETWORK_RATE = 50e9
"""Bytes per second to other machines, each way: a network card of 400 Gbit/s for each GPU."""

EXCHANGE_SHARE = 0.8
"""Of these rates between GPUs. Assumed; not yet measured."""

KEPT_BYTES = 2 * LARGE_BYTES
GIVEN_BACK_SHARE = 0.5
"""What a CPU's allocator (glibc's) keeps of the memory that a step leaves free at its end, and how
often it gives back the rest, to be taken anew in the next step: about every other time, by what
happens to lie on top. Measured on two cores."""


def seconds(found: Simulation, rates: Rates, device: Device) -> float:
    """A step's time: computing, with copies to and from the host beside it; the host's AdamW after.

    Copies go both ways at once, half of them in each direction. What a shared sequence's processes
    exchange is waited for where it takes longer than the attention beside it. Between the CPUs of
    this machine it takes no time, and so do gradients and weights between any devices.
    """
    work = found.work
    attention = (
        work.attention_forward_flops / rates.attention_forward
        + work.attention_backward_flops / rates.attention_backward
    )
    computing = work.product_flops / rates.products + attention + work.memory_bytes / rates.memory
    exchanging, awaited = exchange_seconds(work, device)
    computing += awaited + max(exchanging - awaited - attention, 0)
    if rates.large:
        given_back = max(found.passing_bytes - KEPT_BYTES, 0) * GIVEN_BACK_SHARE
        computing += (work.large_bytes + given_back) / rates.large
    copying = work.link_bytes / 2 / rates.link
    return max(computing, copying) + work.host_memory_bytes / HOST_MEMORY_RATE


def exchange_seconds(work: Work, device: Device) -> tuple[float, float]:
    """What the processes of a shared sequence exchange, and the part that nothing goes beside."""
    if device.peer_rate is None:
        return 0.0, 0.0
    peers, network = device.peer_rate * EXCHANGE_SHARE, NETWORK_RATE * EXCHANGE_SHARE
    return (
        work.peer_bytes / peers + work.network_bytes / network,
        work.awaited_peer_bytes / peers + work.awaited_network_bytes / network,
    )
