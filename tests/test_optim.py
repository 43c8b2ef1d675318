"""The optimizer: its schedule, its groups, its precisions."""

import math

import pytest
import torch
from torch import nn

from mst_train.config import OptimizerConfig
from mst_train.optim import Optimizer, learning_rate

CONFIG = OptimizerConfig(
    learning_rate=0.01,
    min_learning_rate_ratio=0.1,
    warmup_steps=10,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.99,
    epsilon=1e-8,
)


def test_learning_rate():
    rates = [learning_rate(step, 110, CONFIG) for step in range(1, 111)]
    assert rates[0] == pytest.approx(0.001)
    assert rates[9] == pytest.approx(0.01)
    assert rates[59] == pytest.approx(0.001 + 0.009 / 2)
    assert rates[-1] == pytest.approx(0.001)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_learning_rate_without_warm_up_and_with_too_much():
    none = OptimizerConfig(learning_rate=1.0, warmup_steps=0)
    assert learning_rate(1, 1, none) == pytest.approx(0.1)
    assert 0.9 < learning_rate(1, 100, none) <= 1.0
    long = OptimizerConfig(learning_rate=1.0, warmup_steps=100)
    assert learning_rate(10, 10, long) == pytest.approx(0.1)


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False))
    return model.to(dtype)


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


def test_steps_are_those_of_adamw():
    model = make_model()
    optimizer = Optimizer(model, CONFIG, master_weights=False)
    weights, states = [p.detach().clone() for p in model.parameters()], {}
    for step in range(1, 4):
        x = torch.randn(4, 6, dtype=torch.float64)
        model(x).square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        rate = 0.01 / step
        weights = textbook_adamw(weights, gradients, CONFIG, rate, states, step)
        optimizer.step(rate)
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
    model = nn.Linear(300, 300, bias=False, dtype=torch.bfloat16)
    optimizer = Optimizer(model, CONFIG, master_weights=False)
    model.weight.grad = torch.ones_like(model.weight)
    assert optimizer.gradient_norm().item() == 300.0


def test_master_weights_keep_what_bf16_rounds_away():
    steps, rate = 40, 1e-4
    exact = make_model(torch.float32)
    for p in exact.parameters():
        p.data = p.data.bfloat16().float()
    model = make_model(torch.float32).bfloat16()
    master = Optimizer(model, CONFIG, master_weights=True)
    reference = Optimizer(exact, CONFIG, master_weights=False)
    for _ in range(steps):
        for low, full in zip(model.parameters(), exact.parameters(), strict=True):
            gradient = torch.randn_like(full).bfloat16()
            (low * gradient).sum().backward()
            full.grad = gradient.float()
            assert low.grad is None
        master.step(rate)
        reference.step(rate)
    for low, full in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(low, full.bfloat16())


def test_master_weights_accumulate_in_fp32():
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    optimizer = Optimizer(model, CONFIG, master_weights=True)
    for value in (1.0, 2**-10, 2**-10):
        (model.weight * value).sum().backward()
    assert optimizer.gradient_norm().item() == 1 + 2**-9


@pytest.mark.parametrize("master_weights", [False, True])
def test_state_goes_on_exactly(master_weights):
    dtype = torch.bfloat16 if master_weights else torch.float32

    def run(model, optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(4, 6, generator=generator).to(dtype)
            model(x).square().sum().backward()
            optimizer.step(0.01)

    whole = make_model(dtype)
    optimizer = Optimizer(whole, CONFIG, master_weights=master_weights)
    run(whole, optimizer, range(3))
    weights = {k: v.clone() for k, v in whole.state_dict().items()}
    state = optimizer.state_dict()
    resumed = make_model(dtype)
    resumed.load_state_dict(weights)
    other = Optimizer(resumed, CONFIG, master_weights=master_weights)
    other.load_state_dict(torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, state))
    run(whole, optimizer, range(3, 6))
    run(resumed, other, range(3, 6))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
