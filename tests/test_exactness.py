"""Every combination of the method's settings gives the standard implementation's weights.

Two optimizer steps in float64: losses, gradient norms and all updated parameters equal to 1e-12 to
those of vanilla, which keeps everything and computes everything once.
"""

import dataclasses
import itertools

import pytest
import torch

from mst_train.attention import select_attention
from mst_train.config import ModelConfig, OptimizerConfig
from mst_train.data import Batch
from mst_train.engine import NativeEngine
from mst_train.engine.step import train_step
from mst_train.model import Policy, build_model
from mst_train.mst import Offload
from mst_train.optim import build_optimizer

CPU = torch.device("cpu")
MODEL = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
)
ROWS, LENGTH = 4, 37
VANILLA = Policy()
CHUNKS = [(1000, 1000, 1000), (16, 7, 20), ("auto", 37, 11)]


def make_batches(accumulation, packed):
    """Rows with unequal numbers of valid labels, in one or two micro-batches."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(MODEL.vocab_size, (ROWS, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, 3:30] = -100
    labels[3] = -100
    batches = []
    for rows in torch.arange(ROWS).chunk(accumulation):
        positions = torch.arange(LENGTH).expand(len(rows), -1)
        cu_seqlens = None
        if packed:
            starts = [r * LENGTH + s for r in range(len(rows)) for s in (0, 5, 6, 30)]
            cu_seqlens = torch.tensor([*starts, len(rows) * LENGTH], dtype=torch.int32)
            positions = positions - torch.tensor([0] * 5 + [5] + [6] * 24 + [30] * 7)
        batches.append(Batch(tokens[rows, :-1], labels[rows], positions, cu_seqlens))
    return batches


def run(policy, accumulation, packed, *, offload=False, in_backward=False):
    """Losses, gradient norms and parameters after two steps."""
    optimizer_config = OptimizerConfig(max_grad_norm=None, in_backward=in_backward)
    attention = select_attention("auto", CPU, torch.float64)
    model = build_model(MODEL, policy=policy, attention=attention, dtype=torch.float64, seed=1)
    model.offload = Offload(CPU) if offload else None
    optimizer = build_optimizer(model, optimizer_config, master_weights=False)
    results = []
    for _ in range(2):
        batches = make_batches(accumulation, packed)
        loss, norm, _ = train_step(NativeEngine(model, optimizer), batches, 1e-2, None)
        results += [torch.tensor(loss), torch.tensor(norm)]
    return [*results, *(p.detach() for p in model.parameters())]


@pytest.fixture(scope="module", params=[False, True], ids=["stream", "documents"])
def packed(request):
    return request.param


@pytest.fixture(scope="module")
def expected(packed):
    return run(VANILLA, 1, packed)


def settings():
    for keep, offload, chunks, accumulation, in_backward in itertools.product(
        (True, False), (True, False), CHUNKS, (1, 2), (True, False)
    ):
        if not (in_backward and accumulation > 1):  # refused: gradients have to add up first
            marks = [pytest.mark.slow] if accumulation > 1 and not (keep and offload) else []
            yield pytest.param(keep, offload, chunks, accumulation, in_backward, marks=marks)


@pytest.mark.parametrize(
    ("keep", "offload", "chunks", "accumulation", "in_backward"), list(settings())
)
def test_every_combination(expected, packed, keep, offload, chunks, accumulation, in_backward):
    mlp, head, block = chunks
    policy = Policy(True, True, mlp, head, {"attention": "all"} if keep else {}, block)
    actual = run(policy, accumulation, packed, offload=offload, in_backward=in_backward)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", [Policy(recompute=True), Policy(mini_sequence=True)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_other_policies(expected, packed, policy, accumulation):
    actual = run(policy, accumulation, packed)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_documents_make_a_difference():
    """The two kinds of packing are not the same computation, so equality above means something."""
    stream, documents = run(VANILLA, 1, False), run(VANILLA, 1, True)
    assert abs(stream[2] - documents[2]) > 1e-6


def test_the_comparison_would_notice_one_wrong_weight(expected, packed):
    changed = dataclasses.replace(VANILLA)
    actual = run(changed, 1, packed)
    actual[-1] = actual[-1] * (1 + 1e-10)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
