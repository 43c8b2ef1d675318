"""Training compared: the same tokens for all, and losses that mean what they say."""

import pytest
import torch

from mst_train.data import Batch, Loader, load_data
from mst_train.engine.step import evaluate
from mst_train.errors import TrainingError
from mst_train.paper import convergence
from mst_train.paper.convergence import Run, Start, begin, compare, cut, mean_loss, token_losses

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


START = Start(batches=2, sequences=2, warmup_steps=1)


@pytest.mark.slow
def test_the_runs_are_compared_on_the_same_tokens(config):
    report = compare(config, 24, START, (0, 1), QUIET)
    assert report["tokens_per_step"] == 96
    assert report["relative_difference"]["fp32"] < 1e-5
    assert 0 < report["relative_difference"]["float64"] < 1e-13
    assert report["exact_steps"] == 5
    first, second = report["seeds"]
    assert first["runs"]["mst"]["losses"] != pytest.approx(second["runs"]["mst"]["losses"])
    for one in report["seeds"]:
        mst, vanilla, short = (one["runs"][name] for name in ("mst", "vanilla", "short"))
        assert len(one["start"]["losses"]) == 4  # two batches of 4 sequences, 2 in a step
        assert mst["losses"] == pytest.approx(vanilla["losses"], rel=1e-5)
        assert mst["losses"] != vanilla["losses"]  # computed in another way
        # All go on from the start's weights; the same tokens in pieces are close, not the same.
        assert short["losses"][0] == pytest.approx(mst["losses"][0], rel=0.02)
        assert short["losses"][0] != pytest.approx(mst["losses"][0], rel=1e-6)
        assert mst["losses"][0] < one["start"]["losses"][0]
        assert [point["step"] for point in mst["validation"]] == [0, 2, 4, 5]
        final = one["final"]["mst"]
        for context in ("long", "short"):
            places = final["by_position"][context]
            assert len(places) == 4
            assert sum(places) / 4 == pytest.approx(final["mean"][context])
        assert len(mst["step_seconds"]) == 5 and mst["median_step_seconds"] > 0
    own = report["long_minus_short"]["each with its own context"]
    assert own["values"] == [
        one["final"]["mst"]["mean"]["long"] - one["final"]["short"]["mean"]["short"]
        for one in report["seeds"]
    ]


def test_the_start_reads_each_sequence_once_and_leaves_the_rest(config):
    data = load_data(config.data)
    loader, again = (Loader(data.training, 1, seed=0) for _ in range(2))
    seen = []

    class Recorded(Run):
        def step(self, batch, rate):
            seen.append((batch, rate))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convergence, "Run", Recorded)
        begin(config, loader, 24, START)
    batches = [next(again) for _ in range(3)]
    tokens = torch.cat([batch.tokens for batch, _ in seen])
    assert torch.equal(tokens.reshape(2, 96), torch.cat([b.tokens for b in batches[:2]]))
    assert all(torch.equal(b.positions, torch.arange(24).expand(2, 24)) for b, _ in seen)
    assert len({rate for _, rate in seen}) == 1  # the warm-up is over after the first
    assert torch.equal(next(loader).tokens, batches[2].tokens)


def test_a_method_with_other_losses_is_an_error(config, monkeypatch):
    monkeypatch.setattr(convergence, "TOLERANCE", 0.0)
    with pytest.raises(TrainingError, match="differ from those of vanilla"):
        compare(config, 24, START, (0,), QUIET)
