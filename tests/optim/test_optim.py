"""The optimizers: groups, precisions, in the backward, on the host."""

import dataclasses
import functools
import importlib.util
import itertools
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from mst_train import deepspeed_adapter
from mst_train.config import ModelConfig, OptimizerConfig
from mst_train.errors import TrainingError, UserError
from mst_train.memory.tracker import MemoryTracker
from mst_train.model import Policy, build_model
from mst_train.optim import (
    HostOptimizer,
    InBackwardOptimizer,
    Optimizer,
    build_optimizer,
)

CONFIG = OptimizerConfig(
    learning_rate=0.01,
    min_learning_rate_ratio=0.1,
    warmup_steps=10,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.99,
    epsilon=1e-8,
)

POLICIES = {
    "vanilla": Policy(),
    "recompute": Policy(recompute=True),
    "mst": Policy(True, True, 16, 24),
}


@functools.cache
def cpu_adam_problem():
    """Why DeepSpeed's CPUAdam cannot be used here; None where it can. Compiles it, once."""
    try:
        deepspeed_adapter.cpu_adam([{"params": [nn.Parameter(torch.ones(3))]}])
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def cpu_adam():
    """Each CPUAdam asks what processor this is, which takes a second: it is asked once."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("cpuinfo"):
            import cpuinfo

            patch.setattr(cpuinfo, "get_cpu_info", functools.cache(cpuinfo.get_cpu_info))
        if cpu_adam_problem():
            pytest.skip(cpu_adam_problem())
        yield


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False))
    return model.to(dtype)


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def textbook_adamw(weights, gradients, config, rate, states, step):
    """Loshchilov and Hutter 2019, algorithm 2."""
    updated = []
    for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
        m, v = states.setdefault(i, (torch.zeros_like(w), torch.zeros_like(w)))
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g**2
        states[i] = m, v
        decay = config.weight_decay if w.ndim > 1 else 0.0
        m_hat = m / (1 - config.beta1**step)
        v_hat = v / (1 - config.beta2**step)
        updated.append(w - rate * (m_hat / (v_hat.sqrt() + config.epsilon) + decay * w))
    return updated


@pytest.mark.parametrize("kind", [Optimizer, InBackwardOptimizer])
def test_steps_are_those_of_adamw(kind):
    model = make_model()
    optimizer = kind(model, CONFIG, master_weights=False)
    weights, states = copies(model), {}
    for step in range(1, 4):
        x = torch.randn(4, 6, dtype=torch.float64)
        loss = model(x).square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        rate = 0.01 / step
        optimizer.set_learning_rate(rate)
        loss.backward()
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        assert optimizer.gradient_norm().item() == pytest.approx(norm, rel=1e-12)
        optimizer.step()
        weights = textbook_adamw(weights, gradients, CONFIG, rate, states, step)
        for parameter, expected in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)
            assert parameter.grad is None


def test_gradient_norm_and_clipping():
    model = make_model()
    optimizer = Optimizer(model, CONFIG, master_weights=False)
    model(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
    expected = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    norm = optimizer.gradient_norm()
    assert norm.item() == pytest.approx(expected, rel=1e-12)
    optimizer.clip(expected * 2, norm)
    assert optimizer.gradient_norm().item() == pytest.approx(expected, rel=1e-6)
    optimizer.clip(expected / 2, norm)
    assert optimizer.gradient_norm().item() == pytest.approx(expected / 2, rel=1e-4)


def test_bf16_norm_is_summed_in_fp32():
    model = nn.Linear(301, 301, bias=False, dtype=torch.bfloat16)
    optimizer = Optimizer(model, CONFIG, master_weights=False)
    model.weight.grad = torch.ones_like(model.weight)
    assert optimizer.gradient_norm().item() == 301.0  # bf16 has no 301


@pytest.mark.parametrize("kind", [Optimizer, InBackwardOptimizer])
def test_master_weights_keep_what_bf16_rounds_away(kind):
    steps, rate = 40, 1e-4
    exact = make_model(torch.float32)
    for p in exact.parameters():
        p.data = p.data.bfloat16().float()
    model = make_model(torch.float32).bfloat16()
    master = kind(model, CONFIG, master_weights=True)
    reference = Optimizer(exact, CONFIG, master_weights=False)
    for _ in range(steps):
        master.set_learning_rate(rate)
        reference.set_learning_rate(rate)
        for low, full in zip(model.parameters(), exact.parameters(), strict=True):
            gradient = torch.randn_like(full).bfloat16()
            (low * gradient).sum().backward()
            full.grad = gradient.float()
            assert low.grad is None
        master.step()
        reference.step()
    for low, full in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(low, full.bfloat16())


def test_master_weights_accumulate_in_fp32():
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    optimizer = Optimizer(model, CONFIG, master_weights=True)
    for value in (1.0, 2**-10, 2**-10):
        (model.weight * value).sum().backward()
    assert optimizer.gradient_norm().item() == 1 + 2**-9


# --- in the backward ---------------------------------------------------------------------------


def make_decoder(policy, *, dtype=torch.float64, **dimensions):
    sizes = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
    }
    return build_model(ModelConfig(**{**sizes, **dimensions}), policy=policy, dtype=dtype)


def run(model, optimizer, steps, *, tokens=40, clip=None, accumulation=1):
    """Train on batches that depend on the step alone; each step's gradient norm."""
    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.set_learning_rate(0.01 / (step + 1))
        for _ in range(accumulation):
            batch = torch.randint(model.config.vocab_size, (1, tokens + 1), generator=generator)
            loss_sum, _ = model(batch[:, :-1], batch[:, 1:])
            (loss_sum / tokens / accumulation).backward()
        norm = optimizer.gradient_norm()
        norms.append(norm.item())
        if clip is not None:
            optimizer.clip(clip, norm)
        optimizer.step()
    return norms


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [(), ("key", "mlp.up", "blocks.1.mlp_norm", "embedding")])
def test_in_the_backward_the_numbers_are_the_same(policy, tied, frozen):
    updated = []
    for kind in (Optimizer, InBackwardOptimizer):
        model = make_decoder(POLICIES[policy], tie_embeddings=tied)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))
        before = copies(model)
        norms = run(model, kind(model, CONFIG, master_weights=False), range(4))
        after = copies(model)
        for old, new, parameter in zip(before, after, model.parameters(), strict=True):
            assert torch.equal(old, new) != parameter.requires_grad
            assert parameter.grad is None
        updated.append((norms, after))
    torch.testing.assert_close(updated[1], updated[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("master_weights", [False, True])
def test_in_the_backward_bf16_is_the_same_bit_for_bit(master_weights):
    updated = []
    for kind in (Optimizer, InBackwardOptimizer):
        model = make_decoder(POLICIES["mst"], dtype=torch.bfloat16)
        optimizer = kind(model, CONFIG, master_weights=master_weights)
        norms = run(model, optimizer, range(4))
        state = optimizer.state_dict()["head.weight"]
        assert state["exp_avg"].dtype == (torch.float32 if master_weights else torch.bfloat16)
        assert ("master" in state) == master_weights
        updated.append((norms, copies(model), optimizer.state_dict()))
    torch.testing.assert_close(updated[1], updated[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "master_weights", "gradient_bytes"),
    [(torch.float32, False, 4), (torch.bfloat16, False, 2), (torch.bfloat16, True, 4)],
)
def test_in_the_backward_gradients_never_exist_together(dtype, master_weights, gradient_bytes):
    """The peak of a step falls by all gradients but those of a layer or two."""
    layers, peaks = 12, []
    for kind in (Optimizer, InBackwardOptimizer):
        with MemoryTracker() as tracker:
            model = make_decoder(
                POLICIES["mst"],
                dtype=dtype,
                num_layers=layers,
                hidden_size=96,
                intermediate_size=256,
            )
            optimizer = kind(model, CONFIG, master_weights=master_weights)
            run(model, optimizer, range(1), tokens=16)
            tracker.reset_peak()
            run(model, optimizer, range(1, 2), tokens=16)
        peaks.append(tracker.peak_bytes)
        in_layers = sum(p.numel() for p in model.blocks.parameters())
    gradients, one_layer = gradient_bytes * in_layers, gradient_bytes * in_layers / layers
    saved = peaks[0] - peaks[1]
    assert gradients - 2 * one_layer < saved < gradients + one_layer


def test_in_the_backward_there_is_no_second_one_and_no_clipping():
    model = make_decoder(POLICIES["mst"])
    optimizer = InBackwardOptimizer(model, CONFIG, master_weights=False)
    with pytest.raises(RuntimeError, match="nothing to clip"):
        run(model, optimizer, range(1), clip=1.0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="one per step"):
        run(model, optimizer, range(1), accumulation=2)


def test_a_step_that_was_not_finished_cannot_be_saved():
    model = make_decoder(POLICIES["mst"])
    optimizer = InBackwardOptimizer(model, CONFIG, master_weights=False)
    run(model, optimizer, range(2))
    optimizer.state_dict()
    model.norm.weight.sum().backward()
    with pytest.raises(TrainingError, match="damaged or not complete"):
        optimizer.state_dict()


# --- on the host -------------------------------------------------------------------------------

HOST_TOLERANCE = {"rtol": 1e-6, "atol": 2e-7}
"""Per updated weight, against torch's AdamW in fp32, after some 6 steps.

Both compute the same formula in fp32 and round its intermediates differently (CPUAdam multiplies
and adds at once): each step's update, at most about the learning rate of 0.01, is off by some
2^-23 of itself, and the weight it is added to, around 1 at most, by half of 2^-23. Six steps come
to 6 * (2^-24 + 0.01 * 2^-21) = 4e-7 at the very worst, and 2e-7 with the signs that occur.
"""


def hosted(model, **settings):
    return HostOptimizer(model, dataclasses.replace(CONFIG, **settings), master_weights=False)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"epsilon": 1e-2}, {"weight_decay": 0.0}])
def test_on_the_host_steps_are_those_of_adamw(cpu_adam, settings):
    """Against the textbook in float64: epsilon after the correction, decay of matrices alone."""
    config = dataclasses.replace(CONFIG, **settings)
    model = make_model(torch.float32)
    optimizer = HostOptimizer(model, config, master_weights=False)
    weights, states = [w.double() for w in copies(model)], {}
    for step in range(1, 7):
        loss = model(torch.randn(4, 6)).square().sum() / 100
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        optimizer.set_learning_rate(0.01)
        loss.backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        gradients = [g.double() for g in gradients]
        weights = textbook_adamw(weights, gradients, config, 0.01, states, step)
    for parameter, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.detach().double(), expected, **HOST_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16_master"])
@pytest.mark.parametrize("tied", [False, True])
def test_on_the_host_clipping_and_accumulation(cpu_adam, precision, tied):
    """The gradients come from a fixed function, so that no chaos of training hides an error."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    updated = []
    for kind in (Optimizer, HostOptimizer):
        model = make_decoder(POLICIES["mst"], dtype=dtype, tie_embeddings=tied)
        optimizer = kind(model, CONFIG, master_weights=precision == "bf16_master")
        norms = []
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            optimizer.set_learning_rate(0.01)
            for _ in range(2):
                directions = [
                    torch.randn(p.shape, generator=generator).to(dtype) for p in model.parameters()
                ]
                pairs = zip(model.parameters(), directions, strict=True)
                sum((p * d).sum() for p, d in pairs).backward()
            norm = optimizer.gradient_norm()
            norms.append(norm.item())
            optimizer.clip(1.0, norm)
            optimizer.step()
        state = optimizer.state_dict()
        updated.append(
            (norms, [state[name].get("master", p) for name, p in model.named_parameters()])
        )
        if dtype == torch.bfloat16:
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, state[name]["master"].bfloat16())
    assert updated[1][0] == pytest.approx(updated[0][0], rel=1e-6)
    torch.testing.assert_close(updated[1][1], updated[0][1], **HOST_TOLERANCE)


@pytest.mark.slow
def test_on_the_host_the_device_holds_no_states(cpu_adam):
    """What is on the device is the model alone: every other tensor is the host's, in fp32."""
    model = make_decoder(POLICIES["mst"], dtype=torch.bfloat16)
    optimizer = HostOptimizer(model, CONFIG, master_weights=True)
    run(model, optimizer, range(2))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for state in optimizer.state_dict().values():
        for key in ("exp_avg", "exp_avg_sq", "master"):
            assert state[key].dtype == torch.float32
            assert state[key].untyped_storage().data_ptr() not in parameters


def test_without_deepspeed_it_says_so(monkeypatch):
    monkeypatch.setattr(deepspeed_adapter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mst-train\[distributed\]'"):
        hosted(make_model(torch.float32))


def test_without_a_compiler_it_says_so(monkeypatch):
    pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder import CPUAdamBuilder

    def fail(self):
        raise RuntimeError("Ninja is required\nto load C++ extensions")

    monkeypatch.setattr(CPUAdamBuilder, "load", fail)
    with pytest.raises(UserError, match=r"\(Ninja is required\): install a C\+\+ compiler"):
        hosted(make_model(torch.float32))


def test_a_build_that_was_killed_is_done_again(monkeypatch, tmp_path, caplog):
    """By the next process, which does not wait for the file that the killed one left."""
    pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.file_baton import FileBaton

    def build(self):
        folder = Path(os.environ["TORCH_EXTENSIONS_DIR"], "cpu_adam")
        baton = FileBaton(str(folder / "lock"))
        taken.append(baton.try_acquire())
        flags.append(self.cxx_args())
        (folder / "cpu_adam.so").touch()
        raise RuntimeError("built enough")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(CPUAdamBuilder, "load", build)
    monkeypatch.setattr(CPUAdamBuilder, "cxx_args", lambda self: ["-O3", "-g"])
    caplog.set_level("INFO", logger="mst_train")
    taken, flags = [], []
    for _ in range(2):
        with pytest.raises(UserError, match="built enough"):
            hosted(make_model(torch.float32))
    assert taken == [True, True]
    assert flags == [["-O3", "-g", "-g0"]] * 2  # no debugger reads it
    assert caplog.messages == ["building DeepSpeed's cpu_adam, once: about a minute"]
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)


# --- states ------------------------------------------------------------------------------------

MODES = {
    "ordinary": {},
    "in_backward": {"in_backward": True, "max_grad_norm": None},
    "host": {"offload": "host"},
}
KINDS = {"ordinary": Optimizer, "in_backward": InBackwardOptimizer, "host": HostOptimizer}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(*modes, marks=[pytest.mark.slow] if "host" in modes else [])
        for modes in itertools.product(MODES, MODES)
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_master"])
def test_state_goes_on(before, after, precision, tmp_path, request):
    """Through a file: bit for bit in the same mode, and where the arithmetic is the same."""
    if "host" in (before, after):
        if precision == "bf16":
            pytest.skip("CPUAdam's states are in fp32")
        request.getfixturevalue("cpu_adam")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16

    def make(mode):
        model = make_decoder(POLICIES["mst"], dtype=dtype)
        config = dataclasses.replace(CONFIG, **MODES[mode])
        optimizer = build_optimizer(model, config, master_weights=precision == "bf16_master")
        assert type(optimizer) is KINDS[mode]
        return model, optimizer

    def save(model, optimizer):
        torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")

    def load(model, optimizer):
        weights, state = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        for name, tensors in state.items():
            loaded = optimizer.state_dict()[name]
            assert loaded.keys() == tensors.keys()
            for key, tensor in tensors.items():
                assert torch.equal(loaded[key], tensor)
                assert loaded[key].dtype == tensor.dtype
                assert loaded[key].data_ptr() != tensor.data_ptr()

    cut, cut_optimizer = make(before)
    run(cut, cut_optimizer, range(3))
    save(cut, cut_optimizer)
    whole, whole_optimizer = make(after)
    load(whole, whole_optimizer)
    if before == after:
        run(cut, cut_optimizer, range(3, 6))
    else:
        cut, cut_optimizer = make("in_backward" if after == "ordinary" else "ordinary")
        load(cut, cut_optimizer)
        run(cut, cut_optimizer, range(3, 6))
    run(whole, whole_optimizer, range(3, 6))
    exact = before == after or after != "host"
    for a, b in zip(cut.parameters(), whole.parameters(), strict=True):
        if exact:
            assert torch.equal(a, b)
        elif precision == "fp32":
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(a, b, rtol=2**-6, atol=1e-3)
    for state in whole_optimizer.state_dict().values():
        assert state["step"].item() == 6


def test_a_state_before_the_first_step():
    model, other = make_model(), make_model()
    state = Optimizer(model, CONFIG, master_weights=False).state_dict()
    assert state == {name: {} for name, _ in model.named_parameters()}
    InBackwardOptimizer(other, CONFIG, master_weights=False).load_state_dict(state)


def test_a_state_of_other_parameters_is_refused():
    optimizer = Optimizer(make_model(), CONFIG, master_weights=False)
    state = optimizer.state_dict()
    masters = {name: {"master": torch.ones(())} for name in state}
    for wrong in ({}, {**state, "more": {}}, {"adamw": {}, "masters": []}, masters):
        with pytest.raises(UserError, match="belongs to other parameters"):
            optimizer.load_state_dict(wrong)
