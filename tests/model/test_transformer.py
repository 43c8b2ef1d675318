"""The decoder: the same result under every policy, and the properties of a causal model."""

import math
from itertools import pairwise

import pytest
import torch

from mst_train.attention import select_attention
from mst_train.config import ModelConfig
from mst_train.memory.tracker import MemoryTracker
from mst_train.model import Policy, build_model
from mst_train.model.flops import matrix_parameters, parameter_count, training_flops
from mst_train.mst import Documents, Offload

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
)
SEQUENCE = 29

VANILLA = Policy()
RECOMPUTE = Policy(recompute=True)


def mst(mlp_chunk, head_chunk, recompute=True, **options):
    return Policy(recompute, True, mlp_chunk, head_chunk, **options)


def make_model(config=CONFIG, policy=VANILLA, dtype=torch.float64):
    return build_model(config, policy=policy, dtype=dtype, seed=3)


def make_batch(rows=2):
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(CONFIG.vocab_size, (rows, SEQUENCE + 1), generator=generator)
    labels = sequences[:, 1:].clone()
    labels[:, 5:9] = -100
    return sequences[:, :-1], labels


def step(model, tokens, labels, positions=None):
    model.zero_grad()
    loss_sum, valid = model(tokens, labels, positions)
    (loss_sum / valid).backward()
    return loss_sum.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize(
    "policy",
    [
        RECOMPUTE,
        mst("auto", "auto"),
        mst(7, 11),
        mst(58, 58),
        mst(1, 1),
        mst(1000, 5),
        mst(7, 11, recompute=False),
        mst(7, 11, keep={}),
    ],
)
def test_every_policy_gives_the_plain_gradients(policy, tie_embeddings):
    config = ModelConfig(**{**vars(CONFIG), "tie_embeddings": tie_embeddings})
    batch = make_batch()
    expected_loss, expected = step(make_model(config), *batch)
    loss, gradients = step(make_model(config, policy), *batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("policy", [VANILLA, RECOMPUTE, mst(7, 11), mst(7, 11, keep={})])
@pytest.mark.parametrize("offload", [False, True])
def test_packed_documents_equal_each_document_alone(policy, offload):
    """Attention confined to documents: loss and gradients are the sums over single documents."""
    tokens, labels = make_batch(rows=1)
    offsets = [0, 4, 5, 20, SEQUENCE]
    model = make_model(policy=policy)
    model.offload = Offload(torch.device("cpu")) if offload else None
    model.zero_grad()
    for start, end in pairwise(offsets):
        model(tokens[:, start:end], labels[:, start:end])[0].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(offsets)])
    documents = Documents(torch.tensor(offsets, dtype=torch.int32))
    model(tokens, labels, positions[None], documents)[0].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-11, atol=1e-11, msg=name)


def test_every_attention_gives_the_same_loss():
    losses = []
    for name in ("reference", "sdpa"):
        attention = select_attention(name, torch.device("cpu"), torch.float64)
        model = build_model(CONFIG, attention=attention, dtype=torch.float64, seed=3)
        losses.append(step(model, *make_batch())[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_loss_is_that_of_the_logits():
    model, (tokens, labels) = make_model(), make_batch()
    loss_sum, valid = model(tokens, labels)
    logits = model.logits(tokens)
    assert logits.shape == (2, SEQUENCE, CONFIG.vocab_size)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss_sum, expected, rtol=1e-12, atol=0)
    assert valid == (labels != -100).sum()


def test_a_token_sees_nothing_of_what_follows():
    model, (tokens, _) = make_model(), make_batch()
    changed = tokens.clone()
    changed[:, 17] = (changed[:, 17] + 1) % CONFIG.vocab_size
    before, after = model.logits(tokens), model.logits(changed)
    assert torch.equal(before[:, :17], after[:, :17])
    assert not torch.isclose(before[:, 17:], after[:, 17:]).all(-1).any()


def test_rows_do_not_see_each_other():
    model, (tokens, _) = make_model(), make_batch()
    torch.testing.assert_close(
        model.logits(tokens)[1:], model.logits(tokens[1:]), rtol=1e-12, atol=1e-12
    )


def test_positions_count_relatively():
    """Rotary embeddings: shifting all positions changes nothing but rounding."""
    model, (tokens, _) = make_model(), make_batch()
    positions = torch.arange(SEQUENCE).expand(2, -1)
    torch.testing.assert_close(model.logits(tokens, positions), model.logits(tokens))
    shifted = model.logits(tokens, positions + 100)
    torch.testing.assert_close(shifted, model.logits(tokens), rtol=1e-3, atol=1e-4)
    stretched = model.logits(tokens, positions * 3)
    assert not torch.allclose(stretched, model.logits(tokens), rtol=1e-3, atol=1e-4)


def test_initialisation():
    """Every parameter has the distribution it should, so none was forgotten."""
    config = ModelConfig(hidden_size=256, num_heads=8, num_kv_heads=4, num_layers=8)
    model = build_model(config, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
            continue
        residual = name.endswith(("output.weight", "down.weight"))
        std = 0.02 / (math.sqrt(2 * config.num_layers) if residual else 1)
        error = 5 * std / math.sqrt(parameter.numel())
        assert abs(parameter.mean()) < error, name
        assert abs(parameter.std() - std) < error, name


def test_initial_loss_is_that_of_knowing_nothing():
    model, (tokens, labels) = make_model(), make_batch()
    loss_sum, valid = model(tokens, labels)
    assert (loss_sum / valid).item() == pytest.approx(math.log(CONFIG.vocab_size), abs=0.05)


def test_seed_decides_the_weights():
    a, b, c = (build_model(CONFIG, seed=s).head.weight for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_tied_embeddings_are_one_parameter():
    config = ModelConfig(**{**vars(CONFIG), "tie_embeddings": True})
    model = build_model(config)
    assert model.head.weight is model.embedding.weight
    untied = sum(p.numel() for p in make_model().parameters())
    tied = sum(p.numel() for p in model.parameters())
    assert untied - tied == CONFIG.vocab_size * CONFIG.hidden_size


def test_published_sizes():
    """Parameter counts of the models that the presets name."""
    llama3 = ModelConfig(128256, 4096, 14336, 32, 32, 8)
    llama2 = ModelConfig(32000, 4096, 11008, 32, 32, 32)
    tied = ModelConfig(500, 64, 100, 3, 4, 2, tie_embeddings=True)
    for config, published in ((llama3, 8_030_261_248), (llama2, 6_738_415_616), (tied, None)):
        model = build_model(config, device="meta")
        count = sum(p.numel() for p in model.parameters())
        assert count == parameter_count(config)
        assert published in (count, None)


def test_flops_are_those_of_the_matrix_products():
    """Counted by torch itself on a forward pass; attention's causal half by the formula."""
    from torch.utils.flop_counter import FlopCounterMode

    model, (tokens, labels) = make_model(), make_batch(rows=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, labels)
    scores = 4 * CONFIG.num_layers * SEQUENCE**2 * CONFIG.hidden_size
    dense_forward = 2 * matrix_parameters(CONFIG) * SEQUENCE
    assert counter.get_total_flops() == dense_forward + scores
    assert training_flops(CONFIG, SEQUENCE) == 3 * (dense_forward + scores / 2)


def test_policies_hold_less_and_less():
    config = ModelConfig(
        vocab_size=2000, hidden_size=64, intermediate_size=224, num_heads=4, num_kv_heads=2
    )
    attention = select_attention("sdpa", torch.device("cpu"), torch.float32)
    tokens = torch.randint(2000, (1, 2048))
    peaks = []
    for policy in (VANILLA, RECOMPUTE, mst(128, 128)):
        model = build_model(config, policy=policy, attention=attention)
        with MemoryTracker() as tracker:
            model(tokens, tokens)[0].backward()
        peaks.append(tracker.peak_bytes)
    vanilla, recompute, mini_sequence = peaks
    assert recompute < 0.75 * vanilla
    assert mini_sequence < 0.35 * recompute
