"""What a process does in the tests of sequence-parallel attention: loss and gradients, in fp64."""

import torch

from mst_train.attention import select_attention
from mst_train.config import Config, DataConfig, ModelConfig, ParallelConfig
from mst_train.data import IGNORED, Batch
from mst_train.distributed import UlyssesAttention, init_distributed
from mst_train.model import Policy, build_model
from mst_train.mst import Documents, Offload

CPU = torch.device("cpu")
LENGTH, ROWS = 24, 2

POLICIES = {
    "vanilla": Policy(),
    "recompute": Policy(recompute=True),
    "mst": Policy(True, True, 5, 7, True, 5),
    "mst, attention twice": Policy(True, True, 5, 7, False, 5),
    "mst, on the host": Policy(True, True, 5, 7, True, 5),
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
    config = Config(
        model=model_config(12, 12),
        data=DataConfig(sequence_length=LENGTH),
        parallel=ParallelConfig(sequence_parallel=degree),
    )
    with init_distributed(config) as topology:
        return [difference(topology, **case) for case in cases]


def difference(topology, policy, heads, keys, packed, options):
    local = select_attention("cpu", CPU, torch.float64)
    batch = make_batch(packed)
    losses, counts, gradients = [], [], []
    for attention in (local, UlyssesAttention(local, topology.sequence_group)):
        shared = attention is not local
        model = build_model(
            model_config(heads, keys, **options),
            policy=POLICIES[policy] if shared else Policy(),
            attention=attention,
            dtype=torch.float64,
            seed=1,
        )
        if shared and policy == "mst, on the host":
            model.offload = Offload(CPU)
        own = topology.part_of(batch) if shared else batch
        loss, count, gradient = loss_and_gradients(model, own)
        if shared:
            loss, count = topology.total([loss, count])
            topology.sum_(gradient)
        losses.append(loss)
        counts.append(count)
        gradients.append(gradient)
    assert counts[0] == counts[1]
    return max(
        abs(losses[1] / losses[0] - 1),
        *(((a - b).abs().max() / b.abs().max()).item() for b, a in zip(*gradients, strict=True)),
    )
