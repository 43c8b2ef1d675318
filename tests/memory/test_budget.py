"""What is refused for its size, and with what advice."""

import pytest
import torch

from mst_train.compose import compose
from mst_train.errors import UserError
from mst_train.memory.budget import GIB, device_bytes, minimum_bytes, require_fit

LLAMA3_8B = 8_030_261_248
CPU = torch.device("cpu")


def llama3(*arguments):
    return compose(["+experiment=llama3_8b_seq60k", *arguments])


def test_bytes_of_the_paper_experiment():
    """bf16 weights, gradients and two states: 8 bytes per parameter, 59.8 GiB."""
    parts = minimum_bytes(llama3(), LLAMA3_8B)
    assert parts == {
        "weights": 2 * LLAMA3_8B,
        "optimizer states": 4 * LLAMA3_8B,
        "kept activations": 32 * 61440 * 4096 * 2,
    }
    short = minimum_bytes(llama3("data.sequence_length=1024"), LLAMA3_8B)
    assert sum(short.values()) == 8 * LLAMA3_8B
    accumulated = minimum_bytes(llama3("train.accumulation_steps=2"), LLAMA3_8B)
    assert accumulated["gradients"] == 2 * LLAMA3_8B


@pytest.mark.parametrize(("precision", "size"), [("fp32", 16), ("bf16", 8), ("bf16_master", 18)])
def test_bytes_per_parameter(precision, size):
    config = llama3(f"precision={precision}", "data.sequence_length=1")
    assert sum(minimum_bytes(config, 1000).values()) == pytest.approx(size * 1000, abs=2**21)


def test_the_estimate_is_below_what_a_step_holds():
    """What is refused could not have worked: a real step's peak is above the minimum."""
    from mst_train.data import Batch
    from mst_train.memory.tracker import MemoryTracker
    from mst_train.model import build_model, select_attention
    from mst_train.mst import Policy
    from mst_train.optim import Optimizer
    from mst_train.train import train_step

    for policy in ("vanilla", "recompute", "mst"):
        config = compose([f"memory={policy}", "data.sequence_length=512", "model.vocab_size=1000"])
        with MemoryTracker() as tracker:
            model = build_model(
                config.model,
                policy=Policy.from_config(config.memory),
                attention=select_attention("sdpa", CPU, torch.float32),
            )
            optimizer = Optimizer(model, config.optimizer, master_weights=False)
            tokens = torch.randint(1000, (1, 512))
            batch = Batch(tokens, tokens, torch.arange(512)[None])
            for _ in range(2):
                train_step(model, optimizer, [batch], 1e-3, 1.0)
        parameters = sum(p.numel() for p in model.parameters())
        minimum = sum(minimum_bytes(config, parameters).values())
        assert 0.7 * tracker.peak_bytes < minimum <= tracker.peak_bytes, policy


def test_advice_names_the_nearest_way_out():
    def message(parameters, *arguments):
        with pytest.raises(UserError) as caught:
            require_fit(llama3(*arguments), parameters, CPU)
        return str(caught.value)

    budget = "memory.device_budget_gib=1"
    assert "weights and their states alone are too large" in message(LLAMA3_8B, budget)
    assert "precision=bf16" in message(LLAMA3_8B, budget, "precision=fp32")
    assert "Set memory.policy=mst" in message(1000, budget, "memory=vanilla")
    longest = GIB / (32 * 4096 * 2)
    assert f"data.sequence_length below {longest:.0f} " in message(0, budget)


def test_a_budget_cannot_exceed_the_device():
    available = device_bytes(CPU)
    assert GIB < available < 2**50
    with pytest.raises(UserError, match="the cpu device has"):
        require_fit(llama3("memory.device_budget_gib=1e9"), 10**12, CPU)
