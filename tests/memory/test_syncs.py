"""How often a step waits for its device: each time, the device has nothing more to do."""

import pytest
import torch

from mst_train.config import Config
from mst_train.data import Batch
from mst_train.engine import NativeEngine, step
from mst_train.memory.counter import StepCounter
from mst_train.memory.devices import find_device
from mst_train.memory.simulated_step import build_decoder, build_ready_optimizer
from mst_train.model import Policy
from mst_train.plan.config import read

SETTINGS = ("model=llama_tiny", "model.num_layers=2", "data.sequence_length=64", "precision=bf16")
CHUNKS = ("memory.block_chunk_tokens=16", "memory.head_chunk_tokens=16", "memory.policy=mst")
IN_BACKWARD = ("optimizer.in_backward=true", "optimizer.max_grad_norm=null")


class Waits(StepCounter):
    """Counts what makes the host wait: numbers read off the device, and copies to it or from it
    that are not asked to go on beside the host.
    """

    def __init__(self):
        super().__init__(512, {})
        self.waits = []

    def operation(self, function, args, kwargs):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self.waits.append("a number is read")
        result = super().operation(function, args, kwargs)
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            sides = {args[0].is_meta, (result if args[1:] == () else args[1]).is_meta}
            if len(sides) == 2 and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                self.waits.append("a tensor is copied")
        return result


def waits_of_a_step(config: Config):
    device, dtype = find_device("h100_80gb"), torch.bfloat16
    tokens = torch.zeros(1, config.data.sequence_length, dtype=torch.int64)
    positions = torch.arange(config.data.sequence_length)[None]
    batches = [Batch(tokens, tokens, positions, None)] * config.train.accumulation_steps
    with Waits() as counter:
        model = build_decoder(config, Policy.from_config(config.memory), dtype, device, counter)
        engine = NativeEngine(model, build_ready_optimizer(model, config, counter))
        counter.waits.clear()
        step.train_step(engine, batches, 1e-3, config.optimizer.max_grad_norm)
    return counter.waits


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("settings", [(), ("memory.offload=host",), ("memory.policy=vanilla",)])
def test_a_step_waits_once_however_many_chunks_and_micro_batches(settings, accumulation):
    accumulate = f"train.accumulation_steps={accumulation}"
    config = read([*SETTINGS, *CHUNKS, *settings, accumulate])
    assert waits_of_a_step(config) == ["a tensor is copied"]  # the loss and the gradient's norm


def test_a_step_that_updates_in_its_backward_sees_the_loss_before():
    config = read([*SETTINGS, *CHUNKS, *IN_BACKWARD])
    assert waits_of_a_step(config) == ["a number is read", "a tensor is copied"]


def test_a_wait_for_each_micro_batch_would_be_seen(monkeypatch):
    def copied_at_once(batch, device):
        return *(t.to(device) for t in (batch.tokens, batch.labels, batch.positions)), None

    monkeypatch.setattr(step, "_move", copied_at_once)
    config = read([*SETTINGS, *CHUNKS, "train.accumulation_steps=4"])
    assert waits_of_a_step(config) == ["a tensor is copied"] * (4 * 3 + 1)
