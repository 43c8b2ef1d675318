"""The mini-sequence LM head and loss against plain torch: values, gradients, memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from mst_train.memory.tracker import MemoryTracker, live_bytes_of
from mst_train.mst import cross_entropy, mini_sequence_cross_entropy

HIDDEN, VOCABULARY, IGNORED = 12, 37, -100


def make_inputs(tokens, dtype=torch.float64, hidden=HIDDEN, vocabulary=VOCABULARY):
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, dtype=dtype)).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,))
    labels[torch.rand(tokens) < 0.2] = IGNORED
    return states, weight, labels


def textbook(hidden, weight, labels, *, softcap=None, z_loss=0.0, label_smoothing=0.0):
    """The loss by its formula, token by token, with nothing of the code under test."""
    total = 0 * (hidden.sum() + weight.sum())
    for state, label in zip(hidden, labels.tolist(), strict=True):
        if label == IGNORED:
            continue
        z = weight @ state
        s = softcap * torch.tanh(z / softcap) if softcap else z
        log_sum_exp = torch.logsumexp(s, 0)
        total = total + (1 - label_smoothing) * (log_sum_exp - s[label])
        total = total + label_smoothing * (log_sum_exp - s.mean()) + z_loss * log_sum_exp**2
    return total


def gradients(function, hidden, weight, labels, scale=1.0, **options):
    result = function(hidden, weight, labels, **options)
    loss = result[0] if isinstance(result, tuple) else result
    return loss, torch.autograd.grad(loss * scale, (hidden, weight))


OPTIONS = [
    {"softcap": softcap, "z_loss": z_loss, "label_smoothing": smoothing}
    for softcap, z_loss, smoothing in itertools.product((None, 3.0), (0.0, 0.01), (0.0, 0.1))
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("function", [cross_entropy, mini_sequence_cross_entropy])
def test_equals_the_formula(function, options):
    inputs = make_inputs(23)
    expected = gradients(textbook, *inputs, scale=0.37, **options)
    if function is mini_sequence_cross_entropy:
        options = {**options, "chunk_tokens": 5}
    actual = gradients(function, *inputs, scale=0.37, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 63])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 16, 100, "auto"])
def test_ragged_sizes(tokens, chunk_tokens):
    inputs = make_inputs(tokens)
    hidden, weight, labels = inputs
    loss = F.cross_entropy(hidden @ weight.t(), labels, ignore_index=IGNORED, reduction="sum")
    expected = loss, torch.autograd.grad(loss * -2.5, (hidden, weight))
    actual = gradients(mini_sequence_cross_entropy, *inputs, scale=-2.5, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_counts_valid_tokens():
    hidden, weight, labels = make_inputs(40)
    _, valid = mini_sequence_cross_entropy(hidden, weight, labels, chunk_tokens=7)
    assert valid.dtype == torch.int64
    assert valid.item() == sum(label != IGNORED for label in labels.tolist()) < 40


@pytest.mark.parametrize("ignored", [slice(4, 8), slice(None)])
def test_ignored_chunks_contribute_nothing(ignored):
    hidden, weight, labels = make_inputs(12)
    labels[ignored] = IGNORED
    expected = gradients(textbook, hidden, weight, labels)
    actual = gradients(mini_sequence_cross_entropy, hidden, weight, labels, chunk_tokens=4)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert not actual[1][0][ignored].any()


def test_another_ignore_index():
    hidden, weight, labels = make_inputs(12)
    labels[labels == IGNORED] = 5
    expected = gradients(textbook, hidden, weight, torch.where(labels == 5, IGNORED, labels))
    actual = gradients(
        mini_sequence_cross_entropy, hidden, weight, labels, chunk_tokens=5, ignore_index=5
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_two_micro_batches_accumulate():
    hidden, weight, labels = make_inputs(24)
    _, expected = gradients(textbook, hidden, weight, labels, scale=1 / 7)
    for part in (slice(0, 11), slice(11, 24)):
        loss, _ = mini_sequence_cross_entropy(hidden[part], weight, labels[part], chunk_tokens=4)
        (loss / 7).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), expected, rtol=1e-12, atol=1e-12)


def test_evaluation_then_training():
    hidden, weight, labels = make_inputs(24)
    with torch.no_grad():
        evaluated, _ = mini_sequence_cross_entropy(hidden, weight, labels, chunk_tokens=5)
    assert not evaluated.requires_grad
    trained, actual = gradients(mini_sequence_cross_entropy, hidden, weight, labels, chunk_tokens=5)
    torch.testing.assert_close(evaluated, trained.detach(), rtol=1e-14, atol=0)
    _, expected = gradients(textbook, hidden, weight, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_input_gets_no_gradient(frozen):
    hidden, weight, labels = make_inputs(12)
    _, expected = gradients(textbook, hidden, weight, labels)
    (hidden, weight)[frozen].requires_grad_(False)
    loss, _ = mini_sequence_cross_entropy(hidden, weight, labels, chunk_tokens=5)
    loss.backward()
    assert (hidden, weight)[frozen].grad is None
    trained = (hidden, weight)[1 - frozen].grad
    torch.testing.assert_close(trained, expected[1 - frozen], rtol=1e-12, atol=1e-12)


def test_second_backward_is_refused():
    hidden, weight, labels = make_inputs(12)
    loss, _ = mini_sequence_cross_entropy(hidden, weight, labels, chunk_tokens=5)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_chunk_size_does_not_change_the_loss_at_all():
    hidden, weight, labels = make_inputs(64, dtype=torch.float32)
    losses = {
        mini_sequence_cross_entropy(hidden, weight, labels, chunk_tokens=chunk)[0].item()
        for chunk in (16, 32, 64)
    }
    assert len(losses) == 1


def test_bf16_is_as_good_as_the_plain_loss():
    hidden, weight, labels = make_inputs(1024, hidden=32, vocabulary=500)
    low = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in low]
    scale = 1 / 1024
    loss, truth = gradients(cross_entropy, *exact, labels, scale=scale)
    plain_loss, plain = gradients(cross_entropy, *low, labels, scale=scale)
    our_loss, ours = gradients(
        mini_sequence_cross_entropy, *low, labels, scale=scale, chunk_tokens=16
    )
    assert our_loss.dtype == torch.float32
    assert abs(our_loss - loss) <= 1.1 * abs(plain_loss - loss) + 1e-5 * loss
    for true, standard, actual in zip(truth, plain, ours, strict=True):
        allowed = (standard.double() - true).norm() * 1.5 + 1e-4 * true.norm()
        assert (actual.double() - true).norm() <= allowed


def extra_bytes(tokens, chunk_tokens, gradient=True):
    """Peak of forward and backward beyond the gradients of hidden states and weight."""
    hidden, weight, labels = make_inputs(tokens, torch.float32, hidden=32, vocabulary=2000)
    if not gradient:
        hidden, weight = hidden.detach(), weight.detach()
    with MemoryTracker() as tracker:
        loss, _ = mini_sequence_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
        grads = torch.autograd.grad(loss, (hidden, weight)) if gradient else ()
    return tracker.peak_bytes - live_bytes_of(*grads)


def test_peak_memory_holds_one_chunk_of_logits():
    chunk_array, per_token = 128 * 2000 * 4, 16
    for tokens in (512, 1024, 4096):
        extra = extra_bytes(tokens, 128)
        assert chunk_array <= extra <= 1.1 * chunk_array + per_token * tokens
    assert extra_bytes(1024, 256) > 1.9 * extra_bytes(1024, 128)


def test_evaluation_holds_no_gradient():
    weight_bytes, hidden_bytes = 2000 * 32 * 4, 4096 * 32 * 4
    extra = extra_bytes(4096, 8, gradient=False)
    assert extra < min(weight_bytes, hidden_bytes)


def test_a_module_is_no_weight():
    hidden, weight, labels = make_inputs(12)
    with pytest.raises(TypeError, match="weight is a Linear, not a tensor: give its weight"):
        mini_sequence_cross_entropy(hidden, torch.nn.Linear(*weight.shape), labels)
    with pytest.raises(TypeError, match="labels is a list, not a tensor"):
        mini_sequence_cross_entropy(hidden, weight, labels.tolist())


def test_shapes_that_do_not_fit():
    hidden, weight, labels = make_inputs(12)
    with pytest.raises(ValueError, match=r"hidden .* and weight .* do not fit"):
        mini_sequence_cross_entropy(hidden, weight.t(), labels)
    with pytest.raises(ValueError, match=r"labels .* do not fit"):
        mini_sequence_cross_entropy(hidden, weight, labels[1:])


def test_mixed_types():
    hidden, weight, labels = make_inputs(12)
    with pytest.raises(ValueError, match=r"hidden is torch\.float32 and weight torch\.float64"):
        mini_sequence_cross_entropy(hidden.float(), weight, labels)


def test_gradients_of_gradients_are_refused():
    hidden, weight, labels = make_inputs(12)
    loss, _ = mini_sequence_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_fp16_does_not_overflow_before_it_is_scaled():
    """The unscaled sum of the weight's gradient passes fp16's largest number."""
    tokens = 90_000
    hidden = torch.ones(tokens, 1, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(8, 1, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.int64)
    loss, valid = mini_sequence_cross_entropy(hidden, weight, labels, chunk_tokens=1024)
    (loss / valid).backward()
    assert weight.grad[0].item() == pytest.approx(-0.875, rel=1e-3)


def test_it_repeats_itself_to_the_last_bit():
    """With several threads and labels that occur many times; resuming exactly depends on it."""
    hidden, weight, labels = make_inputs(4096, torch.float32, hidden=64, vocabulary=50)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        runs = [
            gradients(mini_sequence_cross_entropy, hidden, weight, labels, chunk_tokens=2048)
            for _ in range(6)
        ]
    finally:
        torch.set_num_threads(threads)
    for loss, grads in runs[1:]:
        assert torch.equal(loss, runs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0][1], strict=True))
