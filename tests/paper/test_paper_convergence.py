"""Training compared: the same tokens for all, and losses that mean what they say."""

import pytest
import torch

from mst_train.data import Batch
from mst_train.engine.step import evaluate
from mst_train.errors import TrainingError
from mst_train.paper import convergence
from mst_train.paper.convergence import Run, compare, cut, mean_loss, token_losses

QUIET = lambda _: None  # noqa: E731


@pytest.fixture
def config(small_config, change):
    return change(
        small_config,
        **{
            "data.sequence_length": 96,
            "memory.block_chunk_tokens": 32,
            "train.steps": 5,
            "train.eval_every": 2,
        },
    )


@pytest.fixture
def batch():
    tokens = torch.arange(48).reshape(2, 24)
    return Batch(tokens, tokens + 1, torch.arange(24).expand(2, 24))


def test_pieces_have_the_same_tokens_and_positions_of_their_own(batch):
    pieces = cut(batch, 8)
    assert pieces.tokens.tolist() == torch.arange(48).reshape(6, 8).tolist()
    assert torch.equal(pieces.labels, pieces.tokens + 1)
    assert pieces.positions.tolist() == [list(range(8))] * 6


def test_losses_are_the_models_own(config, batch):
    model = Run(config, 24).model
    assert mean_loss(model, [batch], 24) == pytest.approx(evaluate(model, [batch]).mean)
    cut_up = mean_loss(model, [batch], 8)
    assert cut_up == pytest.approx(evaluate(model, [cut(batch, 8)]).mean)
    # The first piece sees what it saw in the whole, the others lose their context.
    whole, pieces = (token_losses(model, batch, length) for length in (24, 8))
    torch.testing.assert_close(whole[:, :8], pieces[:, :8])
    assert (whole[:, 8:] - pieces[:, 8:]).abs().max() > 1e-4


@pytest.mark.slow
def test_the_runs_are_compared_on_the_same_tokens(config):
    report = compare(config, 24, QUIET)
    mst, vanilla, short = (report["runs"][name] for name in ("mst", "vanilla", "short"))
    assert mst["losses"] == pytest.approx(vanilla["losses"], rel=1e-5)
    assert mst["losses"] != vanilla["losses"]  # computed in another way
    assert report["largest_relative_difference"] < 1e-5
    assert mst["losses"][-1] < mst["losses"][0]
    # The same tokens in pieces: close at the first weights, and not the same.
    assert short["losses"][0] == pytest.approx(mst["losses"][0], rel=0.02)
    assert short["losses"][0] != pytest.approx(mst["losses"][0], rel=1e-6)
    assert [point["step"] for point in mst["validation"]] == [2, 4, 5]
    assert report["tokens_per_step"] == 96
    final = report["final"]["mst"]
    assert len(final["by_position"]) == 4
    assert sum(final["by_position"]) / 4 == pytest.approx(final["long"])
    assert len(mst["step_seconds"]) == 5 and mst["median_step_seconds"] > 0


def test_a_method_with_other_losses_is_an_error(config, monkeypatch):
    monkeypatch.setattr(convergence, "TOLERANCE", 0.0)
    with pytest.raises(TrainingError, match="differ from those of vanilla"):
        compare(config, 24, QUIET)
