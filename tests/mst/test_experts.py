"""Mixtures of experts, the standard way, against a formula for each token by itself."""

import pytest
import torch
import torch.nn.functional as F

from mst_kernels.glu import ACTIVATIONS
from mst_train.mst import gated_experts, gated_mlp, route

HIDDEN, INTERMEDIATE, EXPERTS = 12, 10, 5


def make_inputs(*shape, dtype=torch.float64, experts=EXPERTS):
    """x, the router's weight, and the experts' gate, up and down."""
    torch.manual_seed(0)
    x = torch.randn(*shape, HIDDEN, dtype=dtype)
    router = torch.randn(experts, HIDDEN, dtype=dtype)
    gate, up = torch.randn(2, experts, INTERMEDIATE, HIDDEN, dtype=dtype) / HIDDEN**0.5
    down = torch.randn(experts, HIDDEN, INTERMEDIATE, dtype=dtype) / INTERMEDIATE**0.5
    return [t.clone().requires_grad_() for t in (x, router, gate, up, down)]


def token_by_token(x, router, gate, up, down, *, top_k, normalize, activation):
    """Every token by itself, and of all experts' results those that count."""
    rows = []
    for x_D in x.flatten(0, -2):
        probabilities = torch.exp(router @ x_D) / torch.exp(router @ x_D).sum()
        chosen = sorted(range(len(router)), key=lambda e: -probabilities[e].item())[:top_k]
        total = sum(probabilities[e] for e in chosen) if normalize else 1
        results = [
            gated_mlp(x_D, gate[e], up[e], down[e], activation=activation)
            for e in range(len(router))
        ]
        rows.append(sum(probabilities[e] / total * results[e] for e in chosen))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("shape", [(1,), (2, 9)])
def test_equals_each_token_by_itself(shape, top_k, normalize, activation):
    inputs = make_inputs(*shape)
    options = {"top_k": top_k, "normalize": normalize, "activation": activation}
    y, expected = gated_experts(*inputs, **options), token_by_token(*inputs, **options)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    actual_gradients = torch.autograd.grad(y, inputs, dy)
    expected_gradients = torch.autograd.grad(expected, inputs, dy)
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=1e-12, atol=1e-12)


def test_experts_without_tokens_have_gradients_of_zero():
    inputs = make_inputs(1, experts=9)
    gated_experts(*inputs, top_k=2).sum().backward()
    for weight in inputs[2:]:
        assert sum(bool(gradient.any()) for gradient in weight.grad) == 2


def test_no_tokens():
    inputs = make_inputs(0)
    y = gated_experts(*inputs, top_k=2)
    y.sum().backward()
    assert y.shape == (0, HIDDEN)
    assert all(t.grad is not None and not t.grad.any() for t in inputs)


def test_weights_are_from_the_largest_on_and_sum_to_one_where_normalized():
    logits = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(1))
    weights, indices = route(logits, 3, normalize=False)
    assert torch.equal(weights, torch.softmax(logits, -1).gather(1, indices))
    assert torch.equal(weights, weights.sort(-1, descending=True).values)
    normalized, same = route(logits, 3, normalize=True)
    assert torch.equal(same, indices)
    torch.testing.assert_close(normalized.sum(-1), torch.ones(50))


def test_probabilities_in_bf16_are_rounded_once():
    logits = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(1)).bfloat16()
    weights, indices = route(logits, 2, normalize=True)
    expected, expected_indices = route(logits.float(), 2, normalize=True)
    assert weights.dtype == torch.bfloat16
    assert torch.equal(indices, expected_indices)
    assert torch.equal(weights, expected.bfloat16())


def test_in_bf16_and_under_autocast():
    """The result is of x's type, and near that of fp32."""
    inputs = make_inputs(40, dtype=torch.float32)
    expected = gated_experts(*inputs, top_k=2)
    narrow = gated_experts(*(t.bfloat16() for t in inputs), top_k=2)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gated_experts(*inputs, top_k=2)
    assert (narrow.dtype, mixed.dtype) == (torch.bfloat16, torch.float32)
    for actual in (narrow.float(), mixed):
        # A token between two experts may go through the other one, and differ altogether.
        near = F.cosine_similarity(actual, expected, dim=-1) > 0.999
        assert near.float().mean() > 0.9


def test_without_values_each_expert_has_its_share():
    inputs = [t.to("meta") for t in make_inputs(7)]
    assert gated_experts(*inputs, top_k=2).shape == (7, HIDDEN)
