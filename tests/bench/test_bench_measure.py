"""Interleaving, medians, peaks, and what becomes of a variant that fails."""

import weakref

import pytest
import torch

from mst_train.bench import measure as module
from mst_train.bench.measure import Variant, collect_garbage, measure
from mst_train.mst import HostBudgetError

CPU = torch.device("cpu")


class Clock:
    """Time passes in runs alone."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def timed(name, clock, durations, log, **options):
    """A variant whose runs take the given times; its first is untimed."""
    remaining = iter(durations)

    def run():
        log.append(name)
        clock.now += next(remaining)

    return Variant(name, run, **options)


def test_rounds_are_interleaved_and_medians_taken(clock):
    log, heard = [], []
    variants = [
        timed("a", clock, [100, 5, 1, 3], log),
        timed("b", clock, [100, 2, 4, 9], log),
    ]
    a, b = measure(variants, 3, CPU, clock=clock, advance=heard.append)
    assert log == heard == ["a", "b"] * 4
    assert a.seconds == [5, 1, 3] and b.seconds == [2, 4, 9]
    assert (a.median_seconds, a.min_seconds) == (3, 1)
    assert (b.median_seconds, b.min_seconds) == (4, 2)


def test_preparation_is_not_timed(clock):
    def prepare():
        clock.now += 1000

    (a,) = measure([timed("a", clock, [1, 1, 1], [], prepare=prepare)], 2, CPU, clock=clock)
    assert a.seconds == [1, 1]


def test_timed_runs_find_the_devices_memory_as_the_run_before_left_it(clock, monkeypatch):
    """Taking it anew costs a GPU as much as a short step."""
    emptied = []
    monkeypatch.setattr(module, "collect_garbage", lambda device: emptied.append(len(log)))
    log = []
    measure([timed(name, clock, [1, 1, 1], log) for name in "ab"], 2, CPU, clock=clock)
    assert len(log) == 6 and max(emptied) < 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of device memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes"), "host memory"),
        (HostBudgetError("too little"), "offload"),
    ],
)
def test_running_out_of_memory_is_recorded_and_the_rest_goes_on(clock, error, said):
    def run_out():
        raise error

    log = []
    variants = [Variant("large", run_out), timed("small", clock, [1, 1, 1], log)]
    large, small = measure(variants, 2, CPU, clock=clock)
    assert said in large.problem and not large.failed
    assert large.seconds == [] and large.median_seconds is None
    assert small.seconds == [1, 1] and small.problem is None


def test_a_variant_that_fails_later_keeps_its_times_and_runs_no_more(clock):
    log = []
    calls = iter([None, None, ValueError("second timed run\nwith details"), None])

    def run():
        log.append("a")
        problem = next(calls)
        if problem:
            raise problem

    (a,) = measure([Variant("a", run)], 3, CPU, clock=clock)
    assert len(log) == 3 and len(a.seconds) == 1
    assert a.problem == "failed: ValueError: second timed run"
    assert a.failed


def test_the_failure_of_somebody_elses_does_not_fail_the_bench(clock):
    def run():
        raise ValueError("no")

    (a,) = measure([Variant("a", run, peer=True)], 1, CPU, clock=clock)
    assert a.problem and not a.failed


def test_what_cannot_run_is_not_run():
    def run():
        raise AssertionError

    (a,) = measure([Variant("a", run, problem="not run: needs CUDA")], 2, CPU)
    assert a.problem == "not run: needs CUDA" and not a.failed


def test_the_peak_is_what_the_work_adds():
    before = torch.zeros(1000)

    def run():
        big = before.repeat(4)
        del big
        return before + 1

    (a,) = measure([Variant("a", run)], 1, CPU)
    assert a.peak_bytes == 4 * before.nbytes


def test_a_failed_variants_memory_comes_back():
    held = []

    def run():
        array = torch.zeros(10)
        held.append(weakref.ref(array))
        raise torch.OutOfMemoryError("CUDA out of memory")

    measure([Variant("a", run)], 1, CPU)
    collect_garbage(CPU)
    assert held[-1]() is None
