"""Time and memory of several ways to do the same work, measured side by side.

Each variant first runs untimed, to warm up and for its peak. Then come rounds, in each of which
every variant runs once: what changes on the machine meanwhile (clock, neighbours) falls on all of
them alike. A variant that fails is recorded with its reason, and the others go on.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from mst_train.errors import memory_ran_out
from mst_train.memory.tracker import MemoryTracker
from mst_train.mst import HostBudgetError


@dataclass(frozen=True)
class Variant:
    """One way to do a piece of work.

    run: the work, which is what is timed; what it returns goes to ``inspect``.
    prepare: puts everything in place before each run; not timed.
    inspect: after the untimed run, what to record of its result.
    warm_up: where something needs to be there before the peak is taken, makes it.
    problem: why it cannot run here, where that is known.
    peer: somebody else's; its failure does not fail the bench.
    compiled: torch.compile's code, whose memory is not seen on a CPU.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], object] = lambda: None
    inspect: Callable[[Any], dict[str, Any]] = lambda _: {}
    warm_up: Callable[[], object] | None = None
    problem: str | None = None
    peer: bool = False
    compiled: bool = False


@dataclass
class Measurement:
    """What was measured of a variant.

    seconds: of each round. cpu_seconds: what all threads of this process computed meanwhile; where
        others use the machine too, it tells more.
    peak_bytes: the most device memory in use at once beyond what was before the work began.
    found: what the variant's ``inspect`` gave.
    failed: it did not run, for another reason than memory, and should have.
    """

    variant: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    found: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    failed: bool = False

    @property
    def median_seconds(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def min_seconds(self) -> float | None:
        return min(self.seconds, default=None)

    def row(self, work: str, tokens: int, **others: Any) -> dict[str, Any]:
        """What results.json says of it, with what there is to say besides."""
        return {
            "work": work,
            "tokens": tokens,
            "variant": self.variant,
            **others,
            "seconds": self.seconds,
            "median_seconds": self.median_seconds,
            "min_seconds": self.min_seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_bytes": self.peak_bytes,
            **self.found,
            "problem": self.problem,
            "failed": self.failed,
        }


def measure(
    variants: Sequence[Variant],
    repetitions: int,
    device: torch.device,
    *,
    advance: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measurement]:
    """Measure all variants; ``advance`` hears of each run, with the variant's name."""
    measurements = []
    for variant in variants:
        advance(variant.name)
        measurements.append(first_run(variant, device))
    time_rounds(variants, measurements, repetitions, device, advance=advance, clock=clock)
    return measurements


def first_run(variant: Variant, device: torch.device) -> Measurement:
    """Run once untimed: the peak, and what the variant's ``inspect`` finds."""
    measurement = Measurement(variant.name, problem=variant.problem)
    if variant.problem is None:
        _attempt(lambda: _first_run(variant, measurement, device), variant, measurement)
    return measurement


def time_rounds(
    variants: Sequence[Variant],
    measurements: Sequence[Measurement],
    repetitions: int,
    device: torch.device,
    *,
    advance: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Add the times of ``repetitions`` rounds to the measurements."""

    def timed_run(variant: Variant) -> tuple[float, float]:
        variant.prepare()
        gc.collect()  # the device's pool stays: a step would pay for taking its memory anew
        synchronize(device)
        started, cpu_started = clock(), time.process_time()
        variant.run()
        synchronize(device)
        return clock() - started, time.process_time() - cpu_started

    # What is there now is left out of collections between runs: they take a moment instead of more
    # time than a short run.
    gc.collect()
    gc.freeze()
    try:
        for _ in range(repetitions):
            for variant, measurement in zip(variants, measurements, strict=True):
                advance(variant.name)
                if measurement.problem is None:
                    times = _attempt(partial(timed_run, variant), variant, measurement)
                    if times is not None:
                        measurement.seconds.append(times[0])
                        measurement.cpu_seconds.append(times[1])
    finally:
        gc.unfreeze()


def collect_garbage(device: torch.device) -> None:
    """Free what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_run(variant: Variant, measurement: Measurement, device: torch.device) -> None:
    if device.type == "cuda":  # kernels are compiled and tuned in a run before the peak's
        variant.prepare()
        variant.run()
    elif variant.warm_up is not None:
        variant.prepare()
        variant.warm_up()
    variant.prepare()
    if variant.compiled and device.type != "cuda":
        result = variant.run()
    else:
        result, measurement.peak_bytes = _peak(variant.run, device)
    measurement.found = variant.inspect(result)


def _peak(work: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    collect_garbage(device)
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with MemoryTracker() as tracker:
        result = work()
    return result, tracker.peak_bytes


def _attempt(work: Callable[[], Any], variant: Variant, measurement: Measurement) -> Any:
    """The work's result; where it fails, None and the reason in ``measurement``."""
    try:
        return work()
    except Exception as error:
        memory, first_line = out_of_memory(error), str(error).strip().partition("\n")[0]
        measurement.problem = memory or f"failed: {type(error).__name__}: {first_line}"
        measurement.failed = memory is None and not variant.peer
    # Only here, past the traceback that held the work's tensors, can their memory come back.
    variant.prepare()
    collect_garbage(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return None


def out_of_memory(error: Exception) -> str | None:
    """In a few words, whose memory ran out; None where the error is another one."""
    if isinstance(error, HostBudgetError):
        return "out of the host memory that offload may take"
    whose = memory_ran_out(error)
    return whose and f"out of {whose} memory"
