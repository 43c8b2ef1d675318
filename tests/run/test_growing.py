"""A new run that starts with another's weights: on other data, at another length."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from test_train import losses, records

import mst_train.run.train as training
from mst_train.config import validate
from mst_train.errors import UserError
from mst_train.run.train import train


@pytest.fixture
def grown(small_config, change):
    """grown(**settings): the configuration of a run that starts where small_config's has ended."""

    def make(**settings):
        of_its_own = {
            "run.dir": small_config.run.dir + "_grown",
            "run.init_from": small_config.run.dir,
        }
        return change(small_config, **of_its_own | settings)

    return make


def part(config, step, name):
    return torch.load(Path(config.run.dir, f"checkpoints/step_{step:08d}/{name}.pt"))


def test_it_starts_with_the_weights_and_states_and_counts_anew(small_config, grown, caplog):
    before = train(small_config)
    config = grown(**{"train.steps": 2, "train.eval_every": 1})
    with caplog.at_level(logging.INFO, logger="mst_train"):
        train(config)
    assert "starting with the weights and optimizer states of" in caplog.text
    first, *_ = [r for r in records(config) if "val_loss" in r]
    assert first["step"] == 0
    assert first["val_loss"] == before["val_loss"]  # at the same length, on the same data
    assert list(losses(config)) == [1, 2]
    assert part(config, 2, "trainer")["position"] == 2
    assert {int(s["step"]) for s in part(config, 2, "optimizer").values()} == {8}
    # The source may be gone when the new run goes on.
    shutil.rmtree(small_config.run.dir)
    train(grown(**{"train.steps": 4}))
    assert list(losses(config)) == [1, 2, 3, 4]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16_master", marks=pytest.mark.slow)])
def test_the_optimizer_may_start_anew(small_config, grown, change, precision):
    small_config = change(small_config, precision=precision)
    train(small_config)
    found = {}
    for carried in (True, False):
        config = grown(
            **{
                "precision": precision,
                "run.init_optimizer": carried,
                "run.dir": f"{small_config.run.dir}_{carried}",
                "train.steps": 2,
            }
        )
        train(config)
        found[carried] = losses(config)
        steps = {int(s["step"]) for s in part(config, 2, "optimizer").values()}
        assert steps == {8 if carried else 2}
    assert found[True][1] == found[False][1]  # the same weights, masters too
    assert found[True][2] != found[False][2]


def test_another_optimizer_starts_anew(small_config, grown):
    train(small_config)
    first = {}
    for name in ("adamw", "muon"):
        settings = {"optimizer.name": name, "run.dir": f"{small_config.run.dir}_{name}"}
        config = grown(**settings, **{"run.init_optimizer": False, "train.steps": 2})
        train(config)
        first[name] = losses(config)[1]
    assert first["muon"] == first["adamw"]  # the same weights
    assert "momentum_buffer" in part(config, 2, "optimizer")["blocks.0.mlp.up.weight"]


def test_lengths_grow_with_the_rope_and_each_stage_resumes(small_config, grown, change):
    """Three stages, each of which is killed once and ends as if it had not been."""
    scaling = {"model.rope_scaling.type": "yarn", "model.rope_scaling.original_length": 100}
    train(small_config)
    origin, step = small_config, training.train_step
    for length, factor in ((200, 2.0), (400, 4.0)):
        settings = {
            **{"data.sequence_length": length, "model.rope_scaling.factor": factor, **scaling},
            **{"train.steps": 4, "train.accumulation_steps": 2, "optimizer.learning_rate": 1e-3},
            **{"run.init_from": origin.run.dir, "run.dir": f"{small_config.run.dir}_{length}"},
        }
        whole = grown(**settings)
        train(whole)
        cut = change(whole, **{"run.dir": whole.run.dir + "_cut"})

        def killed(*arguments, cut=cut):
            if len(losses(cut)) == 3:
                raise KeyboardInterrupt
            return step(*arguments)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training, "train_step", killed)
            train(cut)
        train(cut)
        assert losses(cut) == losses(whole)
        at_start = next(r for r in records(whole) if r["step"] == 0)["val_loss_by_position"]
        assert abs(at_start["0"] - at_end(origin)) < 0.1
        origin = whole


def at_end(config):
    """The last validation loss of the first positions."""
    summary = json.loads(Path(config.run.dir, "summary.json").read_text())
    return summary["val_loss_by_position"]["0"]


def test_other_data_with_the_same_tokenizer(small_config, grown, change, corpus, tmp_path):
    cache = tmp_path / "own_cache"
    before = change(small_config, **{"data.cache_dir": str(cache)})
    train(before)
    (tokenizer,) = cache.glob("tokenizers/*.model")
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    next(other.rglob("*.txt")).write_text("Other words, and few of them. " * 300)
    settings = {"data.source": str(other), "data.cache_dir": str(cache), "train.steps": 2}
    with pytest.raises(UserError, match=rf"these data: set data\.tokenizer={tokenizer}$"):
        train(grown(**settings))
    train(grown(**settings, **{"data.tokenizer": str(tokenizer)}))


def test_the_losses_of_routers_may_change(small_config, change, tmp_path):
    """Where another run begins, that is: one that goes on keeps its loss."""
    before = change(small_config, **{"model.num_experts": 3, "train.steps": 2})
    train(before)
    balanced = change(before, **{"model.balance_loss": 0.1, "model.router_z_loss": 0.01})
    with pytest.raises(UserError, match=r"balance_loss=0\.1, but .*\(run\.init_from=.* takes its"):
        train(balanced)
    train(change(balanced, **{"run.dir": str(tmp_path / "new"), "run.init_from": before.run.dir}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.num_layers": 3}, r"model\.num_layers=3, but run\.init_from=.* was made with 2: "),
        ({"precision": "bf16"}, r"precision=bf16, but run\.init_from=.* was made with fp32"),
        ({"optimizer.name": "muon"}, r"made with adamw and .* set run\.init_optimizer=false"),
        ({"data.tokenizer_vocab_size": 400}, "with another tokenizer than"),
        ({"run.init_from": "nowhere"}, r"run\.init_from=nowhere is no place with a whole checkpoi"),
    ],
)
def test_what_is_refused(small_config, grown, settings, message):
    train(small_config)
    config = grown(**settings)
    with pytest.raises(UserError, match=message):
        train(config)
    assert not Path(config.run.dir).exists()


def test_continuing_and_starting_anew_are_not_both(small_config, change):
    config = change(small_config, **{"run.resume": "runs/a", "run.init_from": "runs/b"})
    assert "run.resume=runs/a continues a run and run.init_from=runs/b" in validate(config)[0]


def test_the_name_of_a_run_is_not_its_folder(small_config, grown, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    train(grown(**{"run.init_from": None, "run.dir": "runs/own", "train.steps": 1}))
    with pytest.raises(UserError, match=r"did you mean run\.init_from=runs/own\?"):
        train(grown(**{"run.init_from": "own"}))
