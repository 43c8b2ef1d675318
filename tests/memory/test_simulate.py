"""The simulated step against the real one, measured by the tracker."""

import pytest
import torch

from mst_train.compose import compose
from mst_train.data import Batch
from mst_train.memory.devices import find_device
from mst_train.memory.simulate import simulate
from mst_train.memory.tracker import MemoryTracker
from mst_train.model import build_model, select_attention
from mst_train.mst import Offload, Policy
from mst_train.optim import build_optimizer
from mst_train.parallel import NativeEngine
from mst_train.step import train_step

CPU = torch.device("cpu")
SMALL = [
    "model.num_layers=3",
    "model.hidden_size=128",
    "model.intermediate_size=448",
    "model.vocab_size=3000",
    "data.sequence_length=1536",
    "kernel.attention=cpu",
]
KEEP_NOTHING = "memory.keep_attention=false"
IN_BACKWARD = ["optimizer.in_backward=true", "optimizer.max_grad_norm=null"]
CHUNKS = [
    "memory.block_chunk_tokens=256",
    "memory.mlp_chunk_tokens=100",
    "memory.head_chunk_tokens=256",
]
SETTINGS = {
    "vanilla": ["memory.policy=vanilla"],
    "recompute": ["memory.policy=recompute"],
    "mst": ["memory.policy=mst"],
    "mst, one chunk": ["memory.policy=mst", "memory.block_chunk_tokens=1536"],
    "mst, small chunks": ["memory.policy=mst", *CHUNKS],
    "mst, attention computed again": ["memory.policy=mst", KEEP_NOTHING, *CHUNKS],
    "mst, offload": ["memory.policy=mst", "memory.offload=host", *CHUNKS],
    "bf16": ["memory.policy=mst", "precision=bf16", *CHUNKS],
    "bf16 master weights": ["memory.policy=mst", "precision=bf16_master", *CHUNKS],
    "bf16 vanilla": ["memory.policy=vanilla", "precision=bf16"],
    "in the backward": ["memory.policy=mst", *IN_BACKWARD, *CHUNKS],
    "in the backward, recompute": ["memory.policy=recompute", *IN_BACKWARD],
    "accumulation": ["memory.policy=mst", "train.accumulation_steps=3", *CHUNKS],
    "accumulation, vanilla": ["memory.policy=vanilla", "train.accumulation_steps=2"],
    "micro-batch of 2": ["memory.policy=mst", "train.micro_batch_size=2", *CHUNKS],
    "packed documents": ["memory.policy=mst", "data.attention=documents", *CHUNKS],
    "packed documents, vanilla": ["memory.policy=vanilla", "data.attention=documents"],
    "many heads, tied": ["model.num_kv_heads=4", "model.tie_embeddings=true", *CHUNKS],
    "large vocabulary": ["memory.policy=mst", "model.vocab_size=20000", *CHUNKS],
    "large vocabulary, vanilla": ["memory.policy=vanilla", "model.vocab_size=20000"],
    "no clipping": ["memory.policy=recompute", "optimizer.max_grad_norm=null"],
}


def configure(*settings):
    return compose([*SMALL, *settings])


def measure(config):
    """Device and host peaks of a real second step."""
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    boundaries = None
    if config.data.attention == "documents":
        boundaries = torch.arange(rows + 1, dtype=torch.int32) * length
    batches = [
        Batch(
            torch.randint(config.model.vocab_size, (rows, length)),
            torch.randint(config.model.vocab_size, (rows, length)),
            torch.arange(length).expand(rows, -1).clone(),
            boundaries,
        )
        for _ in range(config.train.accumulation_steps)
    ]
    with MemoryTracker() as tracker:
        model = build_model(
            config.model,
            policy=Policy.from_config(config.memory),
            attention=select_attention(config.kernel.attention, CPU, dtype),
            dtype=dtype,
        )
        if config.memory.offload == "host":
            model.offload = Offload(CPU)
        optimizer = build_optimizer(
            model, config.optimizer, master_weights=config.precision == "bf16_master"
        )
        engine = NativeEngine(model, optimizer)
        for _ in range(2):
            tracker.reset_peak()
            train_step(engine, batches, 1e-3, config.optimizer.max_grad_norm)
    return tracker.peak_bytes, tracker.peak_host_bytes


@pytest.mark.parametrize("name", SETTINGS)
def test_predicted_is_measured(name):
    config = configure(*SETTINGS[name])
    measured, measured_host = measure(config)
    predicted = simulate(config, find_device("cpu"))
    print(f"{name}: predicted {predicted.allocated_bytes}, measured {measured}")
    assert predicted.allocated_bytes == pytest.approx(measured, rel=0.02)
    assert predicted.host_bytes == pytest.approx(measured_host, rel=0.02)
    assert sum(predicted.breakdown.values()) == predicted.allocated_bytes
