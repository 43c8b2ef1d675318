"""What a process does in the test of memory: its live bytes in a step, by the degree."""

import torch
import torch.distributed as dist

from mst_train.config import Config, ModelConfig, ParallelConfig
from mst_train.data import Batch
from mst_train.memory.tracker import MemoryTracker
from mst_train.model import build_model, select_attention
from mst_train.mst import Policy
from mst_train.parallel import UlyssesAttention, grid, joined

CPU = torch.device("cpu")
LENGTH = 1024
MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=160,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
)
POLICIES = {
    "vanilla": Policy(),
    "recompute": Policy(recompute=True),
    "mst": Policy(True, True, 8, 8),
}


def peak_bytes(degrees):
    """The peak of forward and backward beyond weights and gradients, by policy and degree."""
    with joined(Config()) as everybody:
        return {
            name: [peak(policy, degree, everybody) for degree in degrees]
            for name, policy in POLICIES.items()
        }


def peak(policy, degree, everybody):
    config = Config(parallel=ParallelConfig(sequence_parallel=degree))
    topology = grid(everybody, config)
    # Alone, too, a process goes the way of several.
    alone, _ = dist.new_subgroups(1)
    local = select_attention("cpu", CPU, torch.float32)
    attention = UlyssesAttention(local, topology.sequence_group or alone)
    model = build_model(MODEL, policy=policy, attention=attention)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    batch = topology.rows_of(Batch(tokens, tokens, torch.arange(LENGTH)[None]))
    peaks = []
    for _ in range(3):  # gloo's threads may let go of a buffer late
        with MemoryTracker() as tracker:
            loss_sum, _ = model(batch.tokens, batch.labels, batch.positions)
            loss_sum.backward()
        peaks.append(tracker.peak_bytes)
    return min(peaks)
