"""Experts in mini-sequences against the plain ones: values, gradients, memory."""

import pytest
import torch

from mst_kernels.glu import ACTIVATIONS
from mst_train.memory.tracker import MemoryTracker, live_bytes_of
from mst_train.mst import gated_experts, grouped, mini_sequence_experts

HIDDEN, INTERMEDIATE, EXPERTS = 12, 20, 5


def make_inputs(shape, dtype=torch.float64, hidden=HIDDEN, intermediate=INTERMEDIATE):
    """x, the router's weight, and the experts' gate, up and down."""
    torch.manual_seed(0)
    x = torch.randn(*shape, hidden, dtype=dtype)
    router = torch.randn(EXPERTS, hidden, dtype=dtype) / hidden**0.5
    gate, up = torch.randn(2, EXPERTS, intermediate, hidden, dtype=dtype) / hidden**0.5
    down = torch.randn(EXPERTS, hidden, intermediate, dtype=dtype) / intermediate**0.5
    return [t.clone().requires_grad_() for t in (x, router, gate, up, down)]


def with_biases(inputs):
    """Those of router, gate, up and down."""
    experts, intermediate, hidden = inputs[2].shape
    shapes = (experts,), (experts, intermediate), (experts, intermediate), (experts, hidden)
    biases = (torch.randn(shape, dtype=inputs[0].dtype) for shape in shapes)
    return [*inputs, *(bias.requires_grad_() for bias in biases)]


def gradients(function, inputs, dy, **options):
    tensors, biases = inputs[:5], inputs[5:] or None
    y = function(*tensors, biases=biases, **{"top_k": 2} | options)
    return y, torch.autograd.grad(y, [i for i in inputs if i.requires_grad], dy)


def assert_equal(inputs, dy, chunk_tokens, **options):
    expected, expected_gradients = gradients(gated_experts, inputs, dy, **options)
    actual, actual_gradients = gradients(
        mini_sequence_experts, inputs, dy, chunk_tokens=chunk_tokens, **options
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("top_k", "normalize"), [(1, False), (2, True), (2, False), (5, True)])
@pytest.mark.parametrize(
    ("shape", "chunk_tokens"),
    [((1,), 1), ((7,), 3), ((65,), 16), ((5,), 100), ((2, 3, 4), 5), ((3000,), "auto")],
)
def test_equals_the_plain_experts(shape, chunk_tokens, top_k, normalize, activation):
    inputs = make_inputs(shape)
    dy = torch.randn_like(inputs[0]) * 3
    options = {"top_k": top_k, "normalize": normalize, "activation": activation}
    assert_equal(inputs, dy, chunk_tokens, **options)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("chunk_tokens", [4, 100])
@pytest.mark.parametrize("frozen", [(), (0,), (5,), (6, 8), (0, 1, 2, 3, 4)])
def test_with_biases(frozen, chunk_tokens, top_k):
    inputs = with_biases(make_inputs((3, 7)))
    for i in frozen:
        inputs[i].requires_grad_(False)
    dy = torch.randn_like(inputs[0])
    assert_equal(inputs, dy, chunk_tokens, top_k=top_k, activation="clamped_swiglu")


def test_an_expert_that_nobody_chooses():
    inputs = make_inputs((20,))
    with torch.no_grad():
        inputs[0][:, 0] = 1
        inputs[1][3, :] = 0
        inputs[1][3, 0] = -100
    assert_equal(inputs, torch.randn_like(inputs[0]), 6)
    _, (_, _, *experts) = gradients(
        mini_sequence_experts, inputs, torch.randn_like(inputs[0]), chunk_tokens=6
    )
    assert not any(gradient[3].any() for gradient in experts)
    assert all(gradient[n].any() for gradient in experts for n in (0, 1, 2, 4))


def test_gradcheck_against_finite_differences():
    inputs = make_inputs((5,), hidden=4, intermediate=3)
    assert torch.autograd.gradcheck(
        lambda *i: mini_sequence_experts(*i, top_k=2, chunk_tokens=2), inputs, eps=1e-7
    )
    inputs = with_biases(inputs)
    assert torch.autograd.gradcheck(
        lambda *i: mini_sequence_experts(*i[:5], biases=i[5:], top_k=2, chunk_tokens=2),
        inputs,
        eps=1e-7,
    )


def test_no_tokens():
    inputs = make_inputs((0,))
    y = mini_sequence_experts(*inputs, top_k=2)
    y.sum().backward()
    assert y.shape == inputs[0].grad.shape == (0, HIDDEN)
    assert all(t.grad is not None and not t.grad.any() for t in inputs)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (4,), (0, 1), (2, 3, 4), (1, 2, 3, 4)])
def test_frozen_inputs_get_no_gradient(frozen):
    inputs = make_inputs((10,))
    for i in frozen:
        inputs[i].requires_grad_(False)
    assert_equal(inputs, torch.randn_like(inputs[0]), 4)


def test_strided_input_and_gradient():
    inputs = make_inputs((10, 2))
    inputs[0] = inputs[0].detach().transpose(0, 1).requires_grad_()
    dy = torch.randn(10, 2, HIDDEN, dtype=torch.float64).transpose(0, 1)
    assert_equal(inputs, dy, 3)


def test_each_weight_gets_one_gradient():
    inputs = make_inputs((10,))
    calls = []
    for i, weight in enumerate(inputs[1:]):
        weight.register_hook(lambda _, i=i: calls.append(i))
    mini_sequence_experts(*inputs, top_k=2, chunk_tokens=2).sum().backward()
    assert sorted(calls) == [0, 1, 2, 3]


def test_the_same_numbers_each_time():
    inputs = make_inputs((100,), dtype=torch.float32)
    dy = torch.randn_like(inputs[0])
    first, again = (gradients(mini_sequence_experts, inputs, dy, chunk_tokens=32) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert all(map(torch.equal, first[1], again[1]))


def test_under_autocast():
    inputs = make_inputs((30,), dtype=torch.float32)
    dy = torch.randn(30, HIDDEN).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, actual = gradients(mini_sequence_experts, inputs, dy, chunk_tokens=8)
    low = [t.detach().bfloat16().requires_grad_() for t in inputs]
    expected_y, expected = gradients(mini_sequence_experts, low, dy, chunk_tokens=8)
    assert y.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in actual)
    assert torch.equal(y, expected_y)
    torch.testing.assert_close(actual, [g.float() for g in expected], rtol=0.01, atol=0.01)


def test_bf16_weight_gradients_are_as_good_as_the_plain_ones():
    """Summed over 128 chunks; a bf16 sum would be several times worse."""
    inputs = make_inputs((2048,), hidden=32, intermediate=48)
    low = [t.detach().bfloat16().requires_grad_() for t in inputs]
    exact_inputs = [t.detach().double().requires_grad_() for t in low]
    chosen = torch.topk(torch.nn.functional.linear(low[0], low[1]), 3).values
    dy = torch.randn_like(inputs[0]).bfloat16()
    dy[chosen[:, 1] - chosen[:, 2] < 0.05] = 0  # where rounding may decide between two experts
    _, truth = gradients(gated_experts, exact_inputs, dy.double())
    _, plain = gradients(gated_experts, low, dy)
    _, chunked = gradients(mini_sequence_experts, low, dy, chunk_tokens=16)
    for exact, standard, ours in zip(truth, plain, chunked, strict=True):
        allowed = (standard.double() - exact).norm() * 1.1 + 1e-4 * exact.norm()
        assert (ours.double() - exact).norm() <= allowed


@pytest.mark.parametrize("several", [False, True])
def test_by_torchs_grouped_products(several, monkeypatch):
    """Which a GPU has; on a CPU torch computes them one by one."""
    inputs = make_inputs((48,), dtype=torch.bfloat16, hidden=16, intermediate=24)
    dy = torch.randn_like(inputs[0])
    options = {"chunk_tokens": 16 if several else 48}
    y, one_by_one = gradients(mini_sequence_experts, inputs, dy, **options)
    monkeypatch.setattr(grouped, "_has_grouped_product", lambda *_: True)
    monkeypatch.setattr(torch, "mm", None)  # by which they are computed one by one
    grouped_y, at_once = gradients(mini_sequence_experts, inputs, dy, **options)
    torch.testing.assert_close(grouped_y, y, rtol=0.02, atol=0.02)
    torch.testing.assert_close(at_once, one_by_one, rtol=0.05, atol=0.05)


def extra_bytes(tokens, chunk_tokens, skewed=False):
    """Peak of forward and backward beyond input, output, their gradients and the weights'."""
    inputs = make_inputs((tokens,), dtype=torch.float32, hidden=64, intermediate=96)
    if skewed:  # all tokens to the same two experts
        with torch.no_grad():
            inputs[0][:, 0] = 1
            inputs[1].zero_()[:2, 0] = 9
    dy = torch.ones(tokens, 64)
    with MemoryTracker() as tracker:
        y = mini_sequence_experts(*inputs, top_k=2, chunk_tokens=chunk_tokens)
        grads = torch.autograd.grad(y, inputs, dy)
    return tracker.peak_bytes - live_bytes_of(y, *grads)


def test_peak_memory_holds_one_chunk_of_intermediates():
    chunk = 256 * 2 * (4 * 96 + 2 * 64) * 4
    for tokens in (1024, 2048, 8192):
        assert chunk <= extra_bytes(tokens, 256) <= 1.15 * chunk
    assert extra_bytes(2048, 256) == extra_bytes(8192, 256) == extra_bytes(8192, 256, skewed=True)
    assert extra_bytes(2048, 512) > 1.9 * extra_bytes(2048, 256)


def test_biases_of_many_experts_take_no_integers_of_their_number():
    tokens, experts, top_k = 256, 64, 4
    shapes = [(tokens, 2), (experts, 2), *3 * [(experts, 2, 2)], (experts,), *3 * [(experts, 2)]]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with MemoryTracker() as tracker:
        y = mini_sequence_experts(*tensors[:5], biases=tensors[5:], top_k=top_k)
        torch.autograd.grad(y.sum(), tensors)
    assert tracker.peak_bytes < 8 * tokens * top_k * experts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 6}, "top_k=6 is not from 1 to 5"),
        ({"top_k": 0}, "top_k=0"),
        ({"activation": "relu"}, "relu"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        mini_sequence_experts(*make_inputs((3,)), **{"top_k": 2} | change)


@pytest.mark.parametrize("top_k", [2.0, True, "2"])
def test_a_count_of_experts_is_a_whole_number(top_k):
    with pytest.raises(TypeError, match=f"top_k={top_k!r} must be a whole number"):
        mini_sequence_experts(*make_inputs((3,)), top_k=top_k)


def test_bad_tensors():
    x, router, gate, up, down = make_inputs((3,))
    with pytest.raises(ValueError, match="do not fit"):
        mini_sequence_experts(x, router, gate, up, down.mT, top_k=2)
    with pytest.raises(ValueError, match="of one type"):
        mini_sequence_experts(x, router, gate, up.float(), down, top_k=2)
    with pytest.raises(ValueError, match=r"biases \(5,\).* do not fit"):
        biases = [torch.zeros(5, dtype=torch.float64)] * 4
        mini_sequence_experts(x, router, gate, up, down, biases=biases, top_k=2)
    for count in (3, 5):
        with pytest.raises(ValueError, match=f"{count} biases: give all of router_bias, gate_bias"):
            mini_sequence_experts(x, router, gate, up, down, biases=[x] * count, top_k=2)
    with pytest.raises(TypeError, match="give its weight"):
        mini_sequence_experts(x, torch.nn.Linear(2, 2), gate, up, down, top_k=2)
