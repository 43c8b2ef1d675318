"""The tracker counts what is alive, no more and no less."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_train.config import ModelConfig, OptimizerConfig
from mst_train.memory.tracker import KINDS, MemoryTracker
from mst_train.model import Policy, build_model
from mst_train.optim import Optimizer

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


def test_kinds_of_a_training_step():
    """Each kind at the moments when its size is known."""
    config = ModelConfig(hidden_size=64, intermediate_size=176, num_layers=3, vocab_size=500)
    for policy in (Policy(recompute=True), Policy(True, True, 64, 64, keep={})):
        model = build_model(config, policy=policy)
        optimizer = Optimizer(model, OptimizerConfig(), master_weights=False)
        parameters = sum(p.nbytes for p in model.parameters())
        hidden = 256 * 64 * 4
        tokens = torch.randint(500, (1, 256))
        with MemoryTracker() as tracker:
            tracker.watch_module(model)
            result = model(tokens, tokens)
            after_forward = tracker.breakdown.copy()
            result[0].backward()
            del result
            after_backward = tracker.breakdown.copy()
            optimizer.step()
            after_step = tracker.breakdown.copy()
        # The blocks' results; the first block's input is the embedding's.
        assert after_forward["checkpoints"] == 3 * hidden
        assert after_forward["parameters"] == after_step["parameters"] == parameters
        assert after_forward["gradients"] == after_step["gradients"] == 0
        assert after_backward["gradients"] == parameters
        assert after_backward["checkpoints"] == after_backward["head"] == 0
        assert after_backward["working_set"] == 0
        assert after_step["optimizer"] == pytest.approx(2 * parameters, rel=0.01)
        assert sum(tracker.peak_breakdown.values()) == tracker.peak_bytes
        assert set(tracker.breakdown) <= set(KINDS)
        logits = 256 * 500 * 4
        assert after_forward["head"] >= (hidden if policy.mini_sequence else logits)
