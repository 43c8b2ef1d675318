"""The mini-sequence MLP against the plain one: values, gradients, memory."""

import pytest
import torch

from mst_kernels.glu import ACTIVATIONS
from mst_train.memory.tracker import MemoryTracker, live_bytes_of
from mst_train.mst import gated_mlp, mini_sequence_mlp

HIDDEN, INTERMEDIATE = 12, 20


def make_inputs(shape, dtype=torch.float64, hidden=HIDDEN, intermediate=INTERMEDIATE):
    torch.manual_seed(0)
    x = torch.randn(*shape, hidden, dtype=dtype)
    gate, up = torch.randn(2, intermediate, hidden, dtype=dtype) / hidden**0.5
    down = torch.randn(hidden, intermediate, dtype=dtype) / intermediate**0.5
    return [t.clone().requires_grad_() for t in (x, gate, up, down)]


def gradients(function, inputs, dy, **options):
    y = function(*inputs, **options)
    return y, torch.autograd.grad(y, [i for i in inputs if i.requires_grad], dy)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("shape", "chunk_tokens"),
    [
        ((1,), 1),
        ((7,), 3),
        ((64,), 16),
        ((65,), 16),
        ((5,), 100),
        ((2, 33), 16),
        ((2, 3, 4), 5),
        ((3000,), "auto"),
    ],
)
def test_equals_the_plain_mlp(shape, chunk_tokens, activation):
    inputs = make_inputs(shape)
    dy = torch.randn_like(inputs[0]) * 3
    expected, expected_gradients = gradients(gated_mlp, inputs, dy, activation=activation)
    actual, actual_gradients = gradients(
        mini_sequence_mlp, inputs, dy, chunk_tokens=chunk_tokens, activation=activation
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=1e-12, atol=1e-12)


def test_gradcheck_against_finite_differences():
    inputs = make_inputs((5,))
    assert torch.autograd.gradcheck(lambda *i: mini_sequence_mlp(*i, chunk_tokens=2), inputs)


def test_no_tokens():
    inputs = make_inputs((0,))
    y = mini_sequence_mlp(*inputs)
    y.sum().backward()
    assert y.shape == inputs[0].grad.shape == (0, HIDDEN)
    assert all(t.grad is not None and not t.grad.any() for t in inputs)


def test_two_micro_batches_accumulate():
    inputs = make_inputs((2, 9))
    x, *weights = inputs
    gated_mlp(*inputs).square().sum().backward()
    expected = [t.grad.clone() for t in inputs]
    for t in inputs:
        t.grad = None
    for row in x:
        mini_sequence_mlp(row, *weights, chunk_tokens=4).square().sum().backward()
    torch.testing.assert_close([t.grad for t in inputs], expected, rtol=1e-12, atol=1e-12)


def test_evaluation_then_training():
    inputs = make_inputs((10,))
    with torch.no_grad():
        evaluated = mini_sequence_mlp(*inputs, chunk_tokens=4)
    assert not evaluated.requires_grad
    dy = torch.randn_like(evaluated)
    trained, actual = gradients(mini_sequence_mlp, inputs, dy, chunk_tokens=4)
    _, expected = gradients(gated_mlp, inputs, dy)
    assert torch.equal(evaluated, trained)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [(0,), (1,), (3,), (1, 2, 3)])
def test_frozen_inputs_get_no_gradient(frozen):
    inputs = make_inputs((10,))
    for i in frozen:
        inputs[i].requires_grad_(False)
    dy = torch.randn_like(inputs[0])
    _, actual = gradients(mini_sequence_mlp, inputs, dy, chunk_tokens=4)
    _, expected = gradients(gated_mlp, inputs, dy)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_strided_input_and_gradient():
    inputs = make_inputs((10, 2))
    inputs[0] = inputs[0].detach().transpose(0, 1).requires_grad_()
    dy = torch.randn(10, 2, HIDDEN, dtype=torch.float64).transpose(0, 1)
    _, actual = gradients(mini_sequence_mlp, inputs, dy, chunk_tokens=3)
    _, expected = gradients(gated_mlp, inputs, dy)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_each_weight_gets_one_gradient():
    """Gradient hooks of DDP and ZeRO count on one gradient per parameter and backward."""
    inputs = make_inputs((10,))
    calls = []
    for i, weight in enumerate(inputs[1:]):
        weight.register_hook(lambda _, i=i: calls.append(i))
    mini_sequence_mlp(*inputs, chunk_tokens=2).sum().backward()
    assert sorted(calls) == [0, 1, 2]


def test_bf16_weight_gradients_are_as_good_as_the_plain_ones():
    """Summed over 128 chunks; a bf16 sum would be several times worse."""
    inputs = make_inputs((2048,), hidden=32, intermediate=48)
    dy = torch.randn_like(inputs[0])
    low = [t.detach().bfloat16().requires_grad_() for t in inputs]
    exact_inputs = [t.detach().double().requires_grad_() for t in low]
    _, truth = gradients(gated_mlp, exact_inputs, dy.bfloat16().double())
    _, plain = gradients(gated_mlp, low, dy.bfloat16())
    _, chunked = gradients(mini_sequence_mlp, low, dy.bfloat16(), chunk_tokens=16)
    for exact, standard, ours in zip(truth, plain, chunked, strict=True):
        allowed = (standard.double() - exact).norm() * 1.1 + 1e-4 * exact.norm()
        assert (ours.double() - exact).norm() <= allowed


def extra_bytes(tokens, chunk_tokens):
    """Peak of forward and backward beyond input, output, their gradients and the weights'."""
    inputs = make_inputs((tokens,), dtype=torch.float32, hidden=64, intermediate=224)
    dy = torch.ones(tokens, 64)
    with MemoryTracker() as tracker:
        y = mini_sequence_mlp(*inputs, chunk_tokens=chunk_tokens)
        grads = torch.autograd.grad(y, inputs, dy)
    return tracker.peak_bytes - live_bytes_of(y, *grads)


def test_peak_memory_holds_one_chunk_of_intermediates():
    chunk_array, temporaries = 256 * 224 * 4, 2
    for tokens in (1024, 2048, 8192):
        extra = extra_bytes(tokens, 256)
        assert 3 * chunk_array <= extra <= (3 + temporaries) * chunk_array
    assert extra_bytes(2048, 256) == extra_bytes(8192, 256)
    assert extra_bytes(2048, 512) > 1.9 * extra_bytes(2048, 256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "not one of silu, gelu_tanh"),
        ({"chunk_tokens": 0}, "positive integer or 'auto'"),
        ({"chunk_tokens": "many"}, "positive integer or 'auto'"),
    ],
)
def test_unusable_options(change, message):
    with pytest.raises(ValueError, match=message):
        mini_sequence_mlp(*make_inputs((4,)), **change)


def test_a_module_is_no_weight():
    x, gate, up, down = make_inputs((4,))
    message = "up_weight is a Linear, not a tensor: give its weight"
    with pytest.raises(TypeError, match=message):
        mini_sequence_mlp(x, gate, torch.nn.Linear(*up.shape), down)


def test_shapes_that_do_not_fit():
    x, gate, up, down = make_inputs((4,))
    with pytest.raises(ValueError, match="do not fit"):
        mini_sequence_mlp(x, gate, up, down.t())


def test_mixed_types():
    x, *weights = make_inputs((4,))
    with pytest.raises(ValueError, match=r"x is torch\.float32, gate_weight torch\.float64"):
        mini_sequence_mlp(x.float(), *weights)


def test_gradients_of_gradients_are_refused():
    inputs = make_inputs((4,))
    y = mini_sequence_mlp(*inputs).sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(y, inputs[0], create_graph=True)


def test_inside_a_compiled_function():
    inputs = make_inputs((5,))
    dy = torch.randn_like(inputs[0])

    def around(mlp):
        return lambda x, *weights, **options: x.sin() + mlp(x.tanh(), *weights, **options)

    expected = gradients(around(gated_mlp), inputs, dy)
    compiled = torch.compile(around(mini_sequence_mlp), backend="aot_eager")
    actual = gradients(compiled, inputs, dy, chunk_tokens=2)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_a_result_that_is_changed_in_place(shape):
    inputs = make_inputs(shape)
    dy = torch.randn_like(inputs[0])

    def around(mlp):
        return lambda x, *weights, **options: mlp(x, *weights, **options).mul_(2).add_(x)

    expected = gradients(around(gated_mlp), inputs, dy)
    actual = gradients(around(mini_sequence_mlp), inputs, dy, chunk_tokens=4)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
