"""A Hugging Face checkpoint is evaluated before any training: what a run from it begins with."""

import json
import re
from pathlib import Path

import pytest

from mst_train.cli.compose import compose
from mst_train.data import load_data
from mst_train.evaluate.__main__ import main
from mst_train.evaluate.checkpoint import evaluate_trained
from mst_train.model import build_model
from mst_train.model.hf.weights import save_pretrained
from mst_train.run.train import train

LENGTH = 512
SIZES = [
    "model.vocab_size=512",
    "model.hidden_size=32",
    "model.intermediate_size=88",
    "model.num_layers=2",
]


@pytest.fixture
def arguments(small_config, tmp_path, monkeypatch):
    """Of a command for a checkpoint that says something, and data; in an empty folder."""
    data = small_config.data
    tokenizer = load_data(data).tokenizer.save(tmp_path / "tokenizer.model")
    model = build_model(compose(["model.initializer_std=0.2", *SIZES]).model, seed=1)
    save_pretrained(
        model,
        tmp_path / "model",
        sequence_length=LENGTH,
        tokenizer=tmp_path / "tokenizer.model",
        token_ids={"eos_token_id": tokenizer.eod},
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return [
        f"model.from_pretrained={tmp_path / 'model'}",
        f"data.source={data.source}",
        f"data.cache_dir={data.cache_dir}",
        f"data.sequence_length={LENGTH}",
        "data.validation_fraction=0.05",
        "train.eval_sequences=3",
        "evaluation.lengths=[400]",
    ]


def test_the_baseline_is_what_a_run_from_it_sees_first(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"{tmp_path / 'model'}\n")
    assert re.search(rf"^ +all +\d+\.\d{{4}} +{3 * LENGTH:,}$", output, re.MULTILINE)
    assert re.search(r"^ +400 +50% +\d+% +\d+% +\d+\.\d{4}$", output, re.MULTILINE)
    assert "Written" not in output and not any(Path.cwd().iterdir())

    result, run = evaluate_trained(arguments)
    assert run is None and result["step"] is None
    run = [f"run.dir={tmp_path / 'run'}", "train.steps=1", "logging=wandb_disabled"]
    train(compose([*arguments, *run]))
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    assert {key: result[key] for key in ("val_loss", "val_loss_by_position")} == {
        key: first[key] for key in ("val_loss", "val_loss_by_position")
    }


def test_with_positions_stretched(arguments):
    plain, stretched = (
        evaluate_trained([*arguments, *more])[0]["val_loss"]
        for more in ([], ["model.rope_scaling.type=linear", "model.rope_scaling.factor=4"])
    )
    assert plain != stretched


def test_what_is_refused(arguments, capsys):
    assert main([*arguments, "run.dir=runs/other"]) == 2
    assert "run.dir=runs/other and model.from_pretrained both say" in capsys.readouterr().err
    assert main([*arguments, "model.intermediate_size=96"]) == 2
    assert "has the shape" in capsys.readouterr().err
    assert not any(Path.cwd().iterdir())
