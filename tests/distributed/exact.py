"""What a process does in the tests of shared sequences: loss and gradients in fp64, and what it
sends and attends to on the way.
"""

from unittest import mock

import torch
import torch.distributed as dist

from mst_train.attention import select_attention
from mst_train.attention.select import CpuKernel, KernelAttention, shared
from mst_train.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from mst_train.data import IGNORED, Batch
from mst_train.distributed import grid, init_distributed
from mst_train.distributed.exchange import sent_bytes
from mst_train.model import Policy, build_model
from mst_train.mst import PIECES, Documents, Offload

CPU = torch.device("cpu")
LENGTH, ROWS = 24, 2

POLICIES = {
    "vanilla": Policy(),
    "recompute": Policy(recompute=True),
    "mst": Policy(True, True, 5, 7, block_chunk_tokens=5),
    "mst, attention twice": Policy(True, True, 5, 7, {}, 5),
    "mst, on the host": Policy(True, True, 5, 7, block_chunk_tokens=5),
    "mst, keeping products": Policy(True, True, 5, 7, dict.fromkeys(PIECES, 1), 5),
    "mst, products on the host": Policy(True, True, 5, 7, dict.fromkeys(PIECES, "all"), 5),
}


def model_config(heads, keys, **options):
    return ModelConfig(
        vocab_size=61,
        hidden_size=4 * heads,
        intermediate_size=40,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=keys,
        **options,
    )


def make_batch(packed):
    """Two rows; documents that reach over the processes' borders, and one of a single token."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(61, (ROWS, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, 2:9] = IGNORED
    labels[1, -1] = IGNORED
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    if not packed:
        return Batch(tokens[:, :-1], labels, positions)
    starts = torch.tensor([0, 5, 6, 17, LENGTH, LENGTH + 10, 2 * LENGTH])
    offsets = torch.arange(ROWS * LENGTH)
    positions = offsets - starts[torch.searchsorted(starts, offsets, right=True) - 1]
    cu_seqlens = starts.to(torch.int32)
    return Batch(tokens[:, :-1], labels, positions.view(ROWS, LENGTH), cu_seqlens)


def loss_and_gradients(model, batch):
    documents = None if batch.cu_seqlens is None else Documents(batch.cu_seqlens)
    loss_sum, valid_tokens = model(batch.tokens, batch.labels, batch.positions, documents)
    loss_sum.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return loss_sum.item(), int(valid_tokens), gradients


def largest_differences(degree, cases):
    """For each case, the largest relative differences of loss and gradients from one process's."""
    with init_distributed(Config()) as everybody:
        return [difference(everybody, degree, **case) for case in cases]


def make_config(degree, heads, keys, options, exchange="auto", at_once="auto"):
    return Config(
        model=model_config(heads, keys, **options),
        train=TrainConfig(micro_batch_size=ROWS),
        data=DataConfig(sequence_length=LENGTH),
        parallel=ParallelConfig(
            sequence_parallel=degree, sequence_exchange=exchange, exchange_heads=at_once
        ),
    )


def make_model(shape, policy, attention):
    return build_model(shape, policy=policy, attention=attention, dtype=torch.float64, seed=1)


ALONE = {}
"""What one process computes, by what that depends on: neither a policy nor an exchange."""


def one_process(packed, heads, keys, options):
    case = repr((packed, heads, keys, options))
    if case not in ALONE:
        local = select_attention("cpu", CPU, torch.float64)
        model = make_model(model_config(heads, keys, **options), Policy(), local)
        ALONE[case] = loss_and_gradients(model, make_batch(packed))
    return ALONE[case]


def difference(everybody, degree, policy, heads, keys, packed, options, **exchange):
    topology = grid(everybody, make_config(degree, heads, keys, options, **exchange))
    attention = shared(select_attention("cpu", CPU, torch.float64), topology.sharing, CPU)
    model = make_model(model_config(heads, keys, **options), POLICIES[policy], attention)
    if policy.endswith("on the host"):
        model.offload = Offload(CPU)
    loss, count, gradients = loss_and_gradients(model, topology.part_of(make_batch(packed)))
    loss, count = topology.total([loss, count])
    topology.sum_(gradients)
    expected_loss, expected_count, expected = one_process(packed, heads, keys, options)
    assert count == expected_count
    return max(
        abs(loss / expected_loss - 1),
        *(
            ((a - b).abs().max() / b.abs().max()).item()
            for a, b in zip(gradients, expected, strict=True)
        ),
    )


class CountingKernel(CpuKernel):
    """Counts the scores that its forward computes."""

    computed = 0

    def forward(self, q, k, v, documents=None, causal=True):
        rows, keys = q.shape[1], k.shape[1]
        each = rows * (rows + 1) // 2 if causal else rows * keys
        CountingKernel.computed += q.shape[0] * q.shape[2] * each
        return super().forward(q, k, v, documents, causal)


def traffic(degree, cases):
    """For each case the bytes that the process sends, as ``sent_bytes`` has it and counted, and the
    scores that it computes in the forward."""
    with init_distributed(Config()) as everybody:
        return [counted(everybody, make_config(degree, **case)) for case in cases]


def counted(everybody, config):
    topology = grid(everybody, config)
    kernel = KernelAttention(CountingKernel(), lambda s: KernelAttention(CountingKernel(s)))
    model = build_model(
        config.model, policy=POLICIES["mst"], attention=shared(kernel, topology.sharing, CPU)
    )
    carry, sent = dist.batch_isend_irecv, []

    def count(operations):
        sent.extend(one.tensor.nbytes for one in operations if one.op is dist.isend)
        return carry(operations)

    CountingKernel.computed = 0
    with mock.patch.object(dist, "batch_isend_irecv", count):
        loss_and_gradients(model, topology.part_of(make_batch(packed=False)))
    return sum(sent_bytes(config, topology.sharing.places)), sum(sent), CountingKernel.computed
