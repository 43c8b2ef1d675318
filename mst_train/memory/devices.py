"""The devices that a plan can be made for: how much they hold and how fast they are.

Memory is what torch reports as a device's total, a little less than the number on the box. Rates
are the makers': dense bf16 products with fp32 sums, memory, and the link to the host in one
direction (PCIe 4 x16 as 25, PCIe 5 x16 as 50 GB/s, which is what pinned copies reach of it). The
GPUs of a machine reach each other by NVLink where they have it, else by that link.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mst_train.errors import UserError
from mst_train.rendezvous.dist_env import local_world_size
from mst_train.units import GIB


@dataclass(frozen=True)
class Device:
    """A device to plan for. Rates are None where they are not known.

    kind: cuda or cpu. memory_bytes: all of it. bf16_flops: products' operations per second.
    memory_rate, link_rate: bytes per second. peer_rate: those to other GPUs of the machine, each
    way.
    """

    name: str
    kind: str
    memory_bytes: int
    bf16_flops: float | None = None
    memory_rate: float | None = None
    link_rate: float | None = None
    peer_rate: float | None = None


def _gpu(
    name: str,
    gib: float,
    tflops: float,
    memory_tb: float,
    link_gb: float,
    nvlink_gb: float | None = None,
) -> Device:
    link, peers = link_gb * 1e9, (nvlink_gb or link_gb) * 1e9
    return Device(name, "cuda", int(gib * GIB), tflops * 1e12, memory_tb * 1e12, link, peers)


DEVICES = {
    device.name: device
    for device in (
        _gpu("a100_40gb", 39.39, 312, 1.555, 25, 300),
        _gpu("a100_80gb", 79.15, 312, 2.039, 25, 300),
        _gpu("h100_80gb", 79.10, 989, 3.35, 50, 450),
        _gpu("h100_pcie_80gb", 79.10, 756, 2.0, 50),
        _gpu("h200", 139.72, 989, 4.8, 50, 450),
        _gpu("b200", 178.35, 2250, 8.0, 50, 900),
        _gpu("l40s_48gb", 44.40, 362, 0.864, 25),
        _gpu("a6000_48gb", 47.40, 155, 0.768, 25),
        _gpu("rtx4090_24gb", 23.60, 165, 1.008, 25),
        _gpu("rtx3090_24gb", 23.60, 71, 0.936, 25),
        _gpu("rtx5090_32gb", 31.35, 209, 1.792, 50),
    )
}

_IN_TORCH_NAME = {
    "A100-SXM4-80GB": "a100_80gb",
    "A100 80GB": "a100_80gb",
    "A100-SXM4-40GB": "a100_40gb",
    "A100-PCIE-40GB": "a100_40gb",
    "H100 PCIe": "h100_pcie_80gb",
    "H100": "h100_80gb",
    "H200": "h200",
    "B200": "b200",
    "L40S": "l40s_48gb",
    "RTX A6000": "a6000_48gb",
    "RTX 4090": "rtx4090_24gb",
    "RTX 3090": "rtx3090_24gb",
    "RTX 5090": "rtx5090_32gb",
}
"""Parts of the names that torch gives devices, the more special ones first."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gb|gib)?", re.IGNORECASE)


def find_device(name: str) -> Device:
    """The device of this name; "auto" is this machine's, a size ("80", "80gb") one of so many GiB.

    Raises UserError for anything else.
    """
    if name == "auto":
        return this_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if name == "cpu":
        return this_device(torch.device("cpu"))
    if name in DEVICES:
        return DEVICES[name]
    size = _SIZE.fullmatch(name)
    if size and float(size[1]) > 0:
        return Device(f"{float(size[1]):g} GiB", "cuda", int(float(size[1]) * GIB))
    raise UserError(
        f"plan.device={name} is not known: name one of {', '.join(DEVICES)}, auto or cpu, or give "
        f"a size in GiB such as 80"
    )


def device_bytes(device: torch.device) -> int:
    """All memory of a device; for the CPU, what this machine or container has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        container = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no container, or its limit is the word "max"
        return machine
    return min(machine, container)


def this_device(device: torch.device) -> Device:
    """A device of this machine, with its rates where its name is known.

    The processes on a machine share its CPU: each has its part of the memory.
    """
    memory = device_bytes(device)
    if device.type == "cpu":
        return Device("cpu", "cpu", memory // local_world_size())
    name = torch.cuda.get_device_name(device)
    known = known_as(name)
    if known is None:
        return Device(name, "cuda", memory)
    return replace(DEVICES[known], name=name, memory_bytes=memory)


def known_as(torch_name: str) -> str | None:
    """The name in DEVICES of a device that torch calls so."""
    return next((known for part, known in _IN_TORCH_NAME.items() if part in torch_name), None)
