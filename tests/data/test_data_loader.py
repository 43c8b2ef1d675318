import gc
import itertools
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mst_train.data import Batch, Loader, fixed_batches
from mst_train.data.loader import READ_AHEAD
from mst_train.data.packing import PackedSequences, Sequence
from mst_train.errors import UserError


def make(count: int, length: int = 3) -> PackedSequences:
    """``count`` sequences; sequence i starts with token i * length."""
    tokens = np.arange(count * length + 1, dtype=np.uint32)
    return PackedSequences(tokens, np.array([[0, len(tokens)]]), length)


def numbers(batch: Batch, length: int = 3) -> list[int]:
    return [int(row[0]) // length for row in batch.tokens]


def test_batch() -> None:
    batch = next(Loader(make(5), 2, seed=0))
    for tensor in (batch.tokens, batch.labels, batch.positions):
        assert tensor.shape == (2, 3) and tensor.dtype == torch.int64 and tensor.is_contiguous()
    assert torch.equal(batch.labels, batch.tokens + 1)
    assert torch.equal(batch.positions, torch.arange(3).expand(2, 3))


@given(
    count=st.integers(1, 20),
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=10),
)
def test_resume_is_exact_with_any_batch_size(count: int, seed: int, sizes: list[int]) -> None:
    """Stopping after every batch and going on with another size changes nothing."""
    whole = Loader(make(count), 1, seed)
    expected = [numbers(next(whole))[0] for _ in range(sum(sizes))]
    seen: list[int] = []
    position = 0
    for size in sizes:
        loader = Loader(make(count), size, seed, position)
        seen += numbers(next(loader))
        position = loader.state()
    assert seen == expected
    assert position == whole.state() == sum(sizes)


@given(count=st.integers(1, 20), batch_size=st.integers(1, 7), seed=st.integers(0, 1000))
def test_each_epoch_holds_every_sequence_once(count: int, batch_size: int, seed: int) -> None:
    loader = Loader(make(count), batch_size, seed)
    batches = itertools.islice(loader, 3 * count)
    stream = [number for batch in batches for number in numbers(batch)]
    for start in range(0, 3 * count, count):
        assert sorted(stream[start : start + count]) == list(range(count))


def test_order_changes_with_seed_and_epoch() -> None:
    def epoch(seed: int, position: int) -> list[int]:
        return numbers(next(Loader(make(50), 50, seed, position)))

    orders = [epoch(0, 0), epoch(0, 50), epoch(1, 0), list(range(50))]
    assert len({tuple(order) for order in orders}) == 4
    assert epoch(0, 0) == orders[0]


@given(count=st.integers(1, 30), batch_size=st.integers(1, 8), limit=st.integers(1, 40))
def test_fixed_batches(count: int, batch_size: int, limit: int) -> None:
    batches = [numbers(batch) for batch in fixed_batches(make(count), batch_size, limit)]
    used = [number for batch in batches for number in batch]
    assert len(used) == min(limit, count)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    gaps = Counter(np.diff([*used, count]).tolist())
    assert used[0] == 0 and max(gaps) - min(gaps) <= 1
    assert batches == [numbers(batch) for batch in fixed_batches(make(count), batch_size, limit)]


# ---------------------------------------------------------------- reading ahead


class Recorder(PackedSequences):
    """Sequences that remember which were read, and fail where they are told to."""

    def __init__(self, count: int, bad: int = -1) -> None:
        tokens = np.arange(3 * count + 1, dtype=np.uint32)
        super().__init__(tokens, np.array([[0, len(tokens)]]), 3)
        self.read: list[int] = []
        self.bad, self.blocked = bad, threading.Event()
        self.blocked.set()

    def __getitem__(self, index: int) -> Sequence:
        self.blocked.wait(300)
        self.read.append(index)
        if index == self.bad:
            raise UserError(f"sequence {index} is damaged")
        return super().__getitem__(index)


def test_batches_are_read_ahead_but_not_counted() -> None:
    sequences = Recorder(100)
    loader = Loader(sequences, 2, seed=0)
    next(loader)
    deadline = time.monotonic() + 300
    while len(sequences.read) < 2 * (1 + READ_AHEAD):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert loader.state() == 2
    time.sleep(0.02)
    assert len(sequences.read) == 2 * (1 + READ_AHEAD)
    sequences.blocked.clear()
    next(loader)  # was read before
    sequences.blocked.set()
    assert loader.state() == 4


def test_what_goes_wrong_is_raised_with_its_batch() -> None:
    whole = Loader(make(20), 1, seed=3)
    order = [numbers(next(whole))[0] for _ in range(20)]
    loader = Loader(Recorder(20, bad=order[5]), 1, seed=3)
    assert [numbers(next(loader))[0] for _ in range(5)] == order[:5]
    for _ in range(2):
        with pytest.raises(UserError, match=f"sequence {order[5]} is damaged"):
            next(loader)
        assert loader.state() == 5


def test_loaders_leave_no_threads() -> None:
    before = set(threading.enumerate())
    for _ in range(20):
        next(Loader(make(5), 1, seed=0))
    deadline = time.monotonic() + 300
    while any(thread.name.startswith("loader") for thread in {*threading.enumerate()} - before):
        gc.collect()
        assert time.monotonic() < deadline
        time.sleep(0.01)
