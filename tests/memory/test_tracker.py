"""The tracker counts what is alive, no more and no less."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_train.memory.tracker import MemoryTracker

KIB = 1024


def kib(n):
    return torch.zeros(n, KIB // 4)


def test_live_and_peak():
    with MemoryTracker() as tracker:
        a = kib(4)
        b = kib(8)
        assert tracker.live_bytes == 12 * KIB
        del a
        assert tracker.live_bytes == 8 * KIB
        c = kib(2)
        assert (tracker.live_bytes, tracker.peak_bytes) == (10 * KIB, 12 * KIB)
        del b, c
    assert (tracker.live_bytes, tracker.peak_bytes) == (0, 12 * KIB)


def test_views_and_in_place_results_count_once():
    with MemoryTracker() as tracker:
        a = kib(4)
        b = a.view(-1)[10:]
        a.add_(1)
        torch.add(a, 1, out=a)
        assert tracker.live_bytes == 4 * KIB
        del a
        assert tracker.live_bytes == 4 * KIB
        del b
        assert tracker.live_bytes == 0


def test_watched_tensors_count_from_then_on():
    a = kib(4)
    with MemoryTracker() as tracker:
        tracker.watch(a, a.t())
        assert tracker.live_bytes == 4 * KIB


def test_saved_tensors_live_until_the_backward():
    x = kib(4).requires_grad_()
    with MemoryTracker() as tracker:
        y = x.exp().exp().sum()
        assert 8 * KIB <= tracker.live_bytes < 9 * KIB
        y.backward()
        del y
        assert tracker.live_bytes == 4 * KIB
        x.grad = None
        assert tracker.live_bytes == 0


def test_reset_peak():
    with MemoryTracker() as tracker:
        kib(64)
        a = kib(1)
        tracker.reset_peak()
        assert tracker.peak_bytes == KIB
        del a


def test_fake_tensors_count_like_real_ones():
    with FakeTensorMode(), MemoryTracker() as tracker:
        x = kib(1024)
        y = x @ x.t()
        del x
        assert tracker.live_bytes == 1024 * 1024 * 4
        assert y.shape == (1024, 1024)
