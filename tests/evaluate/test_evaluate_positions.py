"""Losses by position against plain torch in float64."""

import pytest
import torch
import torch.nn.functional as F

from mst_train.config import ModelConfig
from mst_train.data import IGNORED, Batch
from mst_train.engine.positions import PositionLosses
from mst_train.engine.step import evaluate
from mst_train.memory.tracker import MemoryTracker
from mst_train.model import Policy, build_model
from mst_train.mst import mini_sequence_cross_entropy, mini_sequence_losses

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    logit_softcap=2.0,
    initializer_std=0.5,
)
LENGTH = 700


def make_batch(confined):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(61, (2, LENGTH), generator=generator)
    labels = torch.randint(61, (2, LENGTH), generator=generator)
    labels[torch.rand(2, LENGTH, generator=generator) < 0.2] = IGNORED
    positions = torch.arange(LENGTH).expand(2, -1)
    if not confined:
        return Batch(tokens, labels, positions)
    # The first row: documents of 300, 350 and 50 tokens; the second: one of 700.
    positions = torch.stack([torch.cat([torch.arange(n) for n in (300, 350, 50)]), positions[1]])
    return Batch(tokens, labels, positions, torch.tensor([0, 300, 650, 700, 1400]).int())


def plain_losses(model, batch):
    """[documents] of (losses, labels): each document through the model by itself."""
    ends = [LENGTH, 2 * LENGTH] if batch.cu_seqlens is None else batch.cu_seqlens[1:].tolist()
    start = 0
    for end in ends:
        tokens, labels = (t.flatten()[start:end] for t in (batch.tokens, batch.labels))
        yield F.cross_entropy(model.logits(tokens[None])[0], labels, reduction="none"), labels
        start = end


@pytest.mark.parametrize("policy", [Policy(), Policy(True, True, 64, 90, block_chunk_tokens=128)])
@pytest.mark.parametrize("confined", [False, True])
def test_equals_a_plain_computation(policy, confined):
    model = build_model(CONFIG, policy=policy, dtype=torch.float64)
    batch = make_batch(confined)
    sums, counts = {}, {}
    with torch.no_grad():
        for losses, labels in plain_losses(model, batch):
            for position, (loss, label) in enumerate(zip(losses.tolist(), labels, strict=True)):
                start = next(s for s in (512, 256, 0) if position >= s)
                if label != IGNORED:
                    sums[start] = sums.get(start, 0.0) + loss
                    counts[start] = counts.get(start, 0) + 1
    found = evaluate(model, [batch])
    assert {b.start: b.tokens for b in found.buckets} == counts
    for bucket in found.buckets:
        assert bucket.loss == pytest.approx(sums[bucket.start] / counts[bucket.start], rel=1e-12)
    assert found.mean == pytest.approx(sum(sums.values()) / sum(counts.values()), rel=1e-12)


def test_the_mean_is_the_losses_by_position_weighted_by_their_tokens():
    model = build_model(CONFIG, policy=Policy(True, True))
    batch = make_batch(confined=False)
    found = evaluate(model, [batch])
    weighted = sum(bucket.loss * bucket.tokens for bucket in found.buckets)
    assert weighted / found.tokens == pytest.approx(found.mean, rel=1e-15)
    with torch.no_grad():
        loss_sum, valid = model(batch.tokens, batch.labels)
    assert found.mean == pytest.approx((loss_sum / valid).item(), rel=1e-6)
    assert found.tokens == valid.item()
    record = found.record()
    assert record["val_loss"] == found.mean
    assert list(record["val_loss_by_position"]) == ["0", "256", "512"]


def test_the_borders_of_the_buckets():
    losses = PositionLosses(torch.device("cpu"))
    positions = torch.tensor([[0, 255, 256, 511, 512, 1023, 1024, 3000, 10**6]])
    losses.add(torch.ones_like(positions).float(), positions != 511, positions)
    found = {bucket.start: bucket.tokens for bucket in losses.result().buckets}
    assert found == {0: 2, 256: 1, 512: 2, 1024: 1, 2048: 1, 524288: 1}


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 40, "auto"])
def test_losses_of_the_head(chunk_tokens, softcap):
    torch.manual_seed(0)
    hidden = torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(37, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(37, (40,))
    labels[::5] = IGNORED
    options = {"chunk_tokens": chunk_tokens, "softcap": softcap}
    losses = mini_sequence_losses(hidden, weight, labels, **options)
    assert not losses.requires_grad
    logits = hidden @ weight.t()
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(capped, labels, reduction="none")
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
    loss_sum, _ = mini_sequence_cross_entropy(hidden, weight, labels, **options)
    assert losses.sum() == loss_sum


def test_one_chunk_of_logits_is_alive():
    hidden, weight = torch.randn(4096, 8), torch.randn(1000, 8)
    labels = torch.randint(1000, (4096,))
    with MemoryTracker() as tracker:
        mini_sequence_losses(hidden, weight, labels, chunk_tokens=64)
    assert tracker.peak_bytes < 4 * (2 * 64 * 1000 + 4096) + 2**16
