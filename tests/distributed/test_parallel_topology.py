"""The grid of processes, their rows and their samples."""

import dataclasses

import pytest
import torch

from mst_train.config import Config, DataConfig, ModelConfig, ParallelConfig, validate
from mst_train.data import Batch, Loader, Sequences
from mst_train.data.packing import Sequence
from mst_train.distributed import SharedSequences, Topology, check_degree, init, init_distributed
from mst_train.distributed.transport import GroupTransport
from mst_train.errors import UserError
from mst_train.mst.sharing import Places, SharedSequence


def topology(rank, world=4, heads=2, keys=1):
    processes = heads * keys
    sharing = SharedSequence(
        Places(heads, keys, rank % processes), GroupTransport(None), GroupTransport(None)
    )
    return Topology(rank=rank, world=world, sharing=None if processes == 1 else sharing)


def test_grid():
    grid = [topology(rank) for rank in range(4)]
    assert [t.data_index for t in grid] == [0, 0, 1, 1]
    assert {t.data_parallel for t in grid} == {2}
    assert [t.is_rank_zero for t in grid] == [True, False, False, False]


@pytest.mark.parametrize(
    ("device", "backend", "device_id"),
    [(torch.device("cpu"), "gloo", None), (torch.device("cuda", 3), "nccl", 3)],
    ids=str,
)
def test_a_group_is_bound_to_its_device(monkeypatch, device, backend, device_id):
    class Joined(Exception):
        pass

    def join(name, **given):
        assert name == backend
        assert given["device_id"] == (None if device_id is None else device)
        raise Joined

    monkeypatch.setattr(init, "world_size", lambda: 4)
    monkeypatch.setattr(init, "_device", lambda: device)
    monkeypatch.setattr(init, "_store", lambda world, timeout: None)
    monkeypatch.setattr(init, "on_one_machine", lambda: False)
    monkeypatch.setattr(init.dist, "init_process_group", join)
    with pytest.raises(Joined), init_distributed(Config()):
        pass


def test_part_of_a_batch():
    tokens = torch.arange(16).view(2, 8)
    batch = Batch(tokens, tokens + 1, tokens % 8, torch.tensor([0, 8, 11, 16], dtype=torch.int32))
    first, second = (topology(rank).part_of(batch) for rank in (2, 3))
    assert first.tokens.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    # The label of a process's last token is the next process's first token.
    assert first.labels[:, -1].tolist() == second.tokens[:, 0].tolist() == [4, 12]
    assert second.positions.tolist() == [[4, 5, 6, 7], [4, 5, 6, 7]]
    assert first.cu_seqlens is second.cu_seqlens is batch.cu_seqlens
    whole = topology(1, heads=1).part_of(batch)
    assert whole is batch


def test_rows_that_do_not_come_out_even():
    tokens = torch.zeros(1, 7, dtype=torch.int64)
    with pytest.raises(UserError, match=r"7 tokens .* parallel\.sequence_parallel=2"):
        topology(0).part_of(Batch(tokens, tokens, tokens))


def config(degree, length=64, heads=4, keys=2):
    return Config(
        model=ModelConfig(num_heads=heads, num_kv_heads=keys),
        data=DataConfig(sequence_length=length),
        parallel=ParallelConfig(sequence_parallel=degree),
    )


@pytest.mark.parametrize(("degree", "world"), [(1, 1), (1, 3), (2, 4), (4, 4), (4, 8)])
def test_degrees_that_fit(degree, world):
    check_degree(config(degree), world)  # 4 is more than the two key-value heads


def test_degrees_that_do_not_fit():
    with pytest.raises(UserError, match="=3 does not divide the number of processes, 4"):
        check_degree(config(3), 4)
    (problem,) = validate(config(3))
    assert "data.sequence_length=64 is not a multiple of parallel.sequence_parallel=3" in problem


def test_one_process_joins_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init_distributed(config(1)) as alone:
        assert (alone.rank, alone.world, alone.sharing) == (0, 1, None)
        assert alone.total([1.5, 2]) == [1.5, 2]
    with pytest.raises(UserError, match="number of processes, 1"), init_distributed(config(2)):
        pass


class Numbered(Sequences):
    """Sequences that are their own numbers."""

    sequence_length = 1

    def __len__(self):
        return 7

    def __getitem__(self, index):
        number = torch.full((1,), index).numpy()
        return Sequence(number, number, number, None)


def seen(sequences, batch_size, batches, position=0):
    loader = Loader(sequences, batch_size, seed=3, position=position)
    numbers = [next(loader).tokens.flatten().tolist() for _ in range(batches)]
    return numbers, loader.state()


@pytest.mark.parametrize("start", [0, 5])
def test_data_groups_share_what_one_process_sees(start):
    one, end = seen(Numbered(), 2, 6, start)
    shared = [SharedSequences(Numbered(), topology(rank), 2, start) for rank in (0, 2)]
    (first, consumed), (second, _) = (seen(sequences, 2, 3) for sequences in shared)
    assert [batch for pair in zip(first, second, strict=True) for batch in pair] == one
    assert shared[0].position(consumed) == end == start + 12


def test_a_sequence_group_reads_the_same():
    same = [seen(SharedSequences(Numbered(), topology(rank), 2, 0), 2, 3) for rank in (2, 3)]
    assert same[0] == same[1]


def test_topology_is_a_value():
    assert dataclasses.replace(topology(0), rank=2) == topology(2)
