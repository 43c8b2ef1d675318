"""What is refused for its size, and with what advice."""

import pytest
import torch

import mst_train.memory.budget as budget_module
from mst_train.compose import compose
from mst_train.data import Batch
from mst_train.errors import UserError
from mst_train.memory.budget import (
    GIB,
    device_bytes,
    minimum_bytes,
    minimum_host_bytes,
    require_fit,
)
from mst_train.memory.tracker import MemoryTracker
from mst_train.model import build_model, select_attention
from mst_train.mst import Offload, Policy
from mst_train.optim import HostOptimizer, build_optimizer
from mst_train.train import train_step

LLAMA3_8B = 8_030_261_248
CPU = torch.device("cpu")
ORDINARY = ("optimizer.in_backward=false",)


def llama3(*arguments):
    return compose(["+experiment=llama3_8b_seq60k", *arguments])


def test_bytes_of_the_paper_experiment():
    """bf16 weights and two states: 6 bytes per parameter, 44.9 GiB; inputs and attention kept."""
    kept_per_token = 32 * (4096 * 2 + 4096 * 2 + 32 * 4)
    parts = minimum_bytes(llama3(), LLAMA3_8B)
    assert parts == {
        "weights": 2 * LLAMA3_8B,
        "optimizer states": 4 * LLAMA3_8B,
        "kept activations": 61440 * kept_per_token,
    }
    assert minimum_host_bytes(llama3(), LLAMA3_8B) == {}
    inputs_alone = minimum_bytes(llama3("memory.keep_attention=false"), LLAMA3_8B)
    assert inputs_alone["kept activations"] == 61440 * 32 * 4096 * 2
    # The formula and flash-attn are no kernels that a block can keep the result of.
    computed_again = minimum_bytes(llama3("kernel.attention=flash_attn"), LLAMA3_8B)
    assert computed_again == inputs_alone


def test_when_gradients_count():
    short = minimum_bytes(llama3("data.sequence_length=1024", *ORDINARY), LLAMA3_8B)
    assert sum(short.values()) == 8 * LLAMA3_8B
    accumulated = minimum_bytes(llama3("train.accumulation_steps=2", *ORDINARY), LLAMA3_8B)
    assert accumulated["gradients"] == 2 * LLAMA3_8B
    for length in (1024, 61440):
        in_backward = minimum_bytes(llama3(f"data.sequence_length={length}"), LLAMA3_8B)
        assert "gradients" not in in_backward


@pytest.mark.parametrize(("precision", "size"), [("fp32", 16), ("bf16", 8), ("bf16_master", 18)])
def test_bytes_per_parameter(precision, size):
    config = llama3(f"precision={precision}", "data.sequence_length=1", *ORDINARY)
    assert sum(minimum_bytes(config, 1000).values()) == pytest.approx(size * 1000, abs=2**21)


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16_master", 2)])
def test_what_is_on_the_host_does_not_count_on_the_device(precision, size):
    config = llama3(
        f"precision={precision}", "optimizer.offload=host", "memory.offload=host", *ORDINARY
    )
    assert minimum_bytes(config, LLAMA3_8B) == {"weights": size * LLAMA3_8B}
    on_device = llama3(f"precision={precision}", *ORDINARY)
    kept = 61440 * 32 * 4096 * (4 if precision == "fp32" else 2)  # attention: if it is a kernel
    assert minimum_host_bytes(config, LLAMA3_8B) == {
        "gradients on the host": 4 * LLAMA3_8B,
        "optimizer states on the host": 12 * LLAMA3_8B,
        "kept activations on the host": kept * (1 if precision == "fp32" else 2)
        + (0 if precision == "fp32" else 61440 * 32 * 32 * 4),
    }
    assert minimum_host_bytes(on_device, LLAMA3_8B) == {}


LONG = [  # what the blocks keep outweighs the weights
    "data.sequence_length=2048",
    "model.num_layers=16",
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.vocab_size=500",
    "memory.mlp_chunk_tokens=128",
    "memory.head_chunk_tokens=128",
]
SETTINGS = {
    "vanilla": ["memory=vanilla"],
    "recompute": ["memory=recompute"],
    "mst": ["memory=mst"],
    "in_backward": ["optimizer.in_backward=true", "optimizer.max_grad_norm=null"],
    "in_backward, masters": [
        "optimizer.in_backward=true",
        "optimizer.max_grad_norm=null",
        "precision=bf16_master",
    ],
    "masters": ["precision=bf16_master"],
    "attention kept": LONG,
    "attention not kept": [*LONG, "memory.keep_attention=false"],
    "offload": ["memory.offload=host"],
    "host optimizer": ["optimizer.offload=host"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_estimate_is_below_what_a_step_holds(name, monkeypatch):
    """What is refused could not have worked: a real step's peak is above the minimum.

    On a CPU, the device's tensors and the host's are tracked together.
    """

    def adamw(groups, **options):  # where it is computed is of no importance here
        del options["bias_correction"], options["adamw_mode"]
        return torch.optim.AdamW(groups, **options, fused=True)

    monkeypatch.setattr("mst_train.optim._cpu_adam", adamw)
    config = compose(
        [
            "data.sequence_length=512",
            "model.vocab_size=1000",
            "kernel.attention=cpu",
            *SETTINGS[name],
        ]
    )
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    with MemoryTracker() as tracker:
        model = build_model(
            config.model,
            policy=Policy.from_config(config.memory),
            attention=select_attention("cpu", CPU, dtype),
            dtype=dtype,
        )
        if config.memory.offload == "host":
            model.offload = Offload(CPU)
        optimizer = build_optimizer(
            model, config.optimizer, master_weights=config.precision == "bf16_master"
        )
        tokens = torch.randint(config.model.vocab_size, (1, config.data.sequence_length))
        batch = Batch(tokens, tokens, torch.arange(config.data.sequence_length)[None])
        for _ in range(2):
            train_step(model, optimizer, [batch], 1e-3, config.optimizer.max_grad_norm)
    assert isinstance(optimizer, HostOptimizer) == (name == "host optimizer")
    parameters = sum(p.numel() for p in model.parameters())
    minimum = sum(minimum_bytes(config, parameters).values())
    minimum += sum(minimum_host_bytes(config, parameters).values())
    assert 0.7 * tracker.peak_bytes < minimum <= tracker.peak_bytes


def refusal(parameters, *arguments):
    with pytest.raises(UserError) as caught:
        require_fit(llama3(*arguments), parameters, CPU)
    return str(caught.value)


def test_advice_names_the_nearest_way_out():
    budget = "memory.device_budget_gib=1"
    assert "weights and their states alone are too large" in refusal(LLAMA3_8B, budget)
    assert "precision=bf16 " in refusal(LLAMA3_8B, budget, "precision=fp32")
    assert "optimizer.offload=host with precision=bf16_master." in refusal(LLAMA3_8B, budget)
    short = "data.sequence_length=1"
    ordinary = refusal(LLAMA3_8B, budget, short, *ORDINARY)
    assert "optimizer.in_backward=true with optimizer.max_grad_norm=null" in ordinary
    assert "Set memory.policy=mst" in refusal(1000, budget, "memory=vanilla")
    longest = GIB / (32 * 4096 * 2)
    inputs_alone = refusal(0, budget, "memory.keep_attention=false")
    assert f"data.sequence_length below {longest:.0f} or memory.offload=host" in inputs_alone


def test_what_the_host_cannot_hold_is_refused(monkeypatch):
    kept = 61440 * 32 * (2 * 4096 * 2 + 32 * 4) / GIB
    message = refusal(1000, "memory.offload=host", "memory.host_budget_gib=1")
    assert f"needs at least {kept:.2f} GiB of host memory" in message
    assert "memory.host_budget_gib allows 1.00" in message
    assert "memory.keep_attention=false" in message

    gpu = torch.device("cuda")
    monkeypatch.setattr(
        budget_module, "device_bytes", lambda device: (80 if device == gpu else 20) * GIB
    )
    states = ("precision=bf16_master", "optimizer.offload=host", "data.sequence_length=1")
    with pytest.raises(UserError, match=r"this machine has 20\.00 GiB\. Set optimizer"):
        require_fit(llama3(*states, *ORDINARY), LLAMA3_8B, gpu)
    # 18.6 GiB on the host fit beside a GPU; on a CPU the weights are in the same memory.
    fits = llama3(*states, *ORDINARY)
    require_fit(fits, int(1.25e9), gpu)
    with pytest.raises(UserError, match=r"weights 2\.33 GiB"):
        require_fit(fits, int(1.25e9), CPU)


def test_a_budget_cannot_exceed_the_device():
    available = device_bytes(CPU)
    assert GIB < available < 2**50
    with pytest.raises(UserError, match="the cpu device has"):
        require_fit(llama3("memory.device_budget_gib=1e9"), 10**12, CPU)
