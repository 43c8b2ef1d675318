"""Each set of validation data has its own loss, in a run and in an evaluation of it."""

import json
from pathlib import Path

import pytest

from mst_train.config import ValidationSetConfig
from mst_train.data import fixed_batches, load_data
from mst_train.engine.step import evaluate
from mst_train.evaluate.__main__ import main
from mst_train.model import build_model
from mst_train.run.train import train


@pytest.fixture
def config(small_config, change, corpus, tmp_path):
    """With a set of one text, and the tokenizer that the corpus has."""
    (tmp_path / "other").mkdir()
    text = " ".join(path.read_text() for path in sorted(corpus.glob("*"))[:2])
    (tmp_path / "other" / "a.txt").write_text(text[::-1] * 3)
    load_data(small_config.data).tokenizer.save(tmp_path / "t.model")
    sets = [ValidationSetConfig("backwards", str(tmp_path / "other"))]
    return change(
        small_config,
        **{"data.tokenizer": str(tmp_path / "t.model"), "data.validation_sets": sets},
    )


def validations(config):
    lines = Path(config.run.dir, "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if "val_loss_backwards" in r]


def test_a_run_records_the_loss_of_each_set(config, change, capsys):
    summary = train(change(config, **{"train.steps": 3}))
    found = validations(config)
    assert [record["step"] for record in found] == [0, 3]
    model = build_model(config.model, seed=config.train.seed)
    data = load_data(config.data)
    for key, some in (
        ("val_loss", data.validation),
        ("val_loss_backwards", data.validation_sets["backwards"]),
    ):
        batches = fixed_batches(some, 1, config.train.eval_sequences)
        assert found[0][key] == pytest.approx(evaluate(model, batches).mean, rel=1e-6)
    assert found[1]["val_loss_backwards"] != found[0]["val_loss_backwards"]
    assert summary["val_loss_backwards"] == found[1]["val_loss_backwards"]
    said = f"step 3: validation loss {summary['val_loss']:.4f}, backwards "
    assert f"{said}{summary['val_loss_backwards']:.4f}" in capsys.readouterr().err
    assert main([f"run.dir={config.run.dir}"]) == 0
    shown = capsys.readouterr().out
    length = config.data.sequence_length
    assert f"\non {config.data.source}, in sequences of {length:,} tokens\n" in shown
    assert f"backwards           {summary['val_loss_backwards']:.4f}" in shown
    saved = json.loads(Path(config.run.dir, "evaluation.json").read_text())
    assert saved["val_loss_backwards"] == pytest.approx(summary["val_loss_backwards"], rel=1e-6)


def test_a_set_is_enough(config, change):
    """Nothing is held out of what is trained on, and sets may change as a run goes on."""
    config = change(config, **{"train.steps": 3, "data.validation_fraction": 0.0})
    assert train(config)["val_loss"] is None
    assert all("val_loss" not in record for record in validations(config))
    (part,) = config.data.validation_sets
    again = [part, ValidationSetConfig("more", part.source)]
    summary = train(change(config, **{"train.steps": 6, "data.validation_sets": again}))
    assert summary["val_loss_more"] == summary["val_loss_backwards"]
