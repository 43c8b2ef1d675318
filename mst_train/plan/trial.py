"""What this machine's device does in about a second: python -m mst_train.plan.trial FILE.

The command writes the file of which ``rates`` reads what GPUs do.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from mst_train.attention import select_attention
from mst_train.attention.select import KernelAttention
from mst_train.cli.command import run_command
from mst_train.environment import describe
from mst_train.errors import UserError
from mst_train.files import write_json
from mst_train.memory.counter import attention_flops

NEW_PAGES_RATE = 0.7e9
"""Bytes per second of pages that a CPU's system has to find. Measured in steps on two cores of a
virtual machine. Not measured anew, because a trial sees pages that were given back a moment ago,
which come up to six times as fast."""

ROUNDS = 9
ROUNDS_SECONDS = 1.0
"""How often each rate is measured; the median counts. No round begins after the seconds, which a
CPU without instructions for bf16 needs for few tokens."""


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


class Trial(NamedTuple):
    """Sizes at which rates are measured."""

    tokens: int
    hidden: int
    features: int
    heads: int
    kv_heads: int
    head_size: int
    bytes: int


FEW_TOKENS = Trial(64, 512, 2048, 8, 8, 64, 2**22)
MANY_TOKENS = FEW_TOKENS._replace(tokens=1024)
"""A CPU's rates are measured at many tokens where all rounds at few were quick enough."""

ON_A_GPU = Trial(8192, 4096, 14336, 32, 8, 128, 2**28)
"""A chunk of Llama3-8B's."""


def measure(device: torch.device, dtype: torch.dtype, trial: Trial) -> Rates:
    """The rates of a device of this machine, with the attention that a run would choose."""
    on_gpu = device.type == "cuda"
    left = torch.ones(trial.tokens, trial.hidden, dtype=dtype, device=device)
    right = torch.ones(trial.hidden, trial.features, dtype=dtype, device=device)
    q = left.new_ones(1, trial.tokens, trial.heads, trial.head_size)
    k = left.new_ones(1, trial.tokens, trial.kv_heads, trial.head_size)
    attention = select_attention("auto", device, dtype)
    assert isinstance(attention, KernelAttention)
    kernel = attention.kernel
    out, lse = kernel.forward(q, k, k)
    many = torch.ones(trial.bytes // 4, device=device)
    host = torch.ones(trial.bytes // 4 if on_gpu else 1, pin_memory=on_gpu)
    seconds = _median_seconds(
        device,
        product=lambda: left @ right,
        forward=lambda: kernel.forward(q, k, k),
        backward=lambda: kernel.backward(q, q, k, k, out, lse),
        memory=lambda: torch.add(many, 1.0, out=many).mul_(1.0),
        link=lambda: many[: host.numel()].copy_(host, non_blocking=True),
    )
    flops = attention_flops(q, k, causal=True)
    # A CPU's caches have read what the second of the two operations reads.
    memory = (4 if on_gpu else 3) * many.nbytes / seconds["memory"]
    return Rates(
        products=2 * left.numel() * trial.features / seconds["product"],
        attention_forward=flops / seconds["forward"],
        attention_backward=2.5 * flops / seconds["backward"],
        memory=memory,
        link=host.nbytes / seconds["link"] if on_gpu else memory,
        large=None if on_gpu else NEW_PAGES_RATE,
        source=(
            "measured on such a device"
            if on_gpu
            else f"measured on this machine's CPU with {torch.get_num_threads()} threads"
        ),
    )


def _median_seconds(device: torch.device, **runs: Callable[[], object]) -> dict[str, float]:
    """The median seconds of each of ``runs``, all in turn, so that a busy moment spoils none."""
    on_gpu = device.type == "cuda"
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values() if on_gpu else ():  # libraries prepare themselves at their first call
        run()
    begun = time.perf_counter()
    for _ in range(ROUNDS):
        if any(times.values()) and time.perf_counter() - begun > ROUNDS_SECONDS:
            break
        for name, run in runs.items():
            if on_gpu:
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(measured) for name, measured in times.items()}


def main(arguments: list[str] | None = None) -> int:
    """Exit status 2 without a file to write."""
    return run_command(_write, arguments, "interrupted: no rates were written")


def _write(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError("name one file to write: python -m mst_train.plan.trial rates.json")
    if torch.cuda.is_available():
        device, trial = torch.device("cuda"), ON_A_GPU
        name = torch.cuda.get_device_name(device)
    else:
        device, trial, name = torch.device("cpu"), FEW_TOKENS, "cpu"
    found = asdict(measure(device, torch.bfloat16, trial))
    write_json(Path(arguments[0]), {name: {"rates": found} | describe(device, __spec__.name)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
