"""Training from a Hugging Face checkpoint, and back to one: settings, weights, tokens, refusals."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from mst_train.checkpoint.writer import CheckpointWriter
from mst_train.cli.compose import compose
from mst_train.config import ModelConfig
from mst_train.data import load_data
from mst_train.errors import UserError
from mst_train.export import export, main
from mst_train.model import build_model
from mst_train.model.hf.weights import load_pretrained, save_pretrained
from mst_train.run import setup as run_setup
from mst_train.run.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, corpus, cache):
    """A run of three steps and what was exported of it: (configuration, folder)."""
    folder = tmp_path_factory.mktemp("exported")
    config = compose(
        [
            f"run.dir={folder / 'run'}",
            f"data.source={corpus}",
            f"data.cache_dir={cache}",
            "data.sequence_length=64",
            "data.tokenizer_vocab_size=512",
            "data.validation_fraction=0.05",
            "model.vocab_size=512",
            "model.hidden_size=32",
            "model.intermediate_size=88",
            "model.num_layers=2",
            "model.num_heads=4",
            "model.tie_embeddings=true",
            "optimizer.learning_rate=3e-3",
            "logging=wandb_disabled",
            "train.steps=3",
            "train.eval_every=3",
            "checkpoint.every=1",
        ]
    )
    train(config)
    assert main([f"checkpoint={config.run.dir}", f"output={folder / 'model'}"]) == 0
    return config, folder / "model"


@pytest.fixture
def arguments(exported, tmp_path):
    config, model = exported
    return [
        f"model.from_pretrained={model}",
        f"run.dir={tmp_path / 'run'}",
        f"data.source={config.data.source}",
        f"data.cache_dir={config.data.cache_dir}",
        "data.sequence_length=64",
        "data.validation_fraction=0.05",
        "logging=wandb_disabled",
        "train.steps=4",
        "train.eval_every=4",
        "train.eval_sequences=4",
        "checkpoint.every=2",
    ]


def weights(config, step):
    path = Path(config.run.dir, "checkpoints", f"step_{step:08d}", "model.pt")
    return torch.load(path, weights_only=True)


# --- export --------------------------------------------------------------------------------------


def test_transformers_computes_the_same_from_what_is_exported(exported):
    transformers = pytest.importorskip("transformers")
    config, folder = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = build_model(config.model)
    ours.load_state_dict(weights(config, 3))
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours.logits(tokens), rtol=1e-5, atol=1e-5)
    assert theirs.config.max_position_embeddings == 64
    tokenizer = load_data(config.data).tokenizer
    assert (folder / "tokenizer.model").read_bytes() == tokenizer.model
    assert theirs.config.eos_token_id == tokenizer.eod


def test_a_checkpoint_by_its_name_and_damage(exported, tmp_path, caplog):
    config, _ = exported
    run = shutil.copytree(config.run.dir, tmp_path / "run")
    steps = sorted((run / "checkpoints").glob("step_*"))
    assert export(steps[0], tmp_path / "a", tokenizer="null") == (steps[0], 2)
    assert not (tmp_path / "a" / "tokenizer.model").exists()
    content = bytearray((steps[1] / "model.pt").read_bytes())
    content[-200] ^= 1
    (steps[1] / "model.pt").write_bytes(content)
    assert export(run, tmp_path / "b")[1] == 2
    with pytest.raises(UserError, match="damaged"):
        export(steps[1], tmp_path / "c")
    (steps[1] / "model.pt").unlink()
    with pytest.raises(UserError, match=r"is not whole: model\.pt is missing"):
        export(steps[1], tmp_path / "c")
    assert {p.name for p in tmp_path.iterdir()} == {"run", "a", "b"}


def test_what_a_killed_export_has_left_goes(exported, tmp_path):
    config, _ = exported
    for name in (".writing-model-123", ".writing-model-123-0a1b2c3d", ".writing-model-2-123"):
        (tmp_path / name / "part").mkdir(parents=True)
    export(config.run.dir, tmp_path / "model", tokenizer="null")
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".writing-model-2-123"}


def test_what_export_refuses(exported, tmp_path, capsys):
    config, folder = exported
    before = sorted(p.name for p in folder.parent.iterdir())
    for arguments, message in (
        ([], "checkpoint is missing"),
        (["checkpoint=x"], "output is missing"),
        (["checkpoint=x", "output=y", "what=1"], "cannot use 'what=1'"),
        (
            ["checkpoint=x", f"output={tmp_path / 'y'}"],
            "checkpoint=x is no place with a whole checkpoint",
        ),
        ([f"checkpoint={config.run.dir}", f"output={folder}"], "is there already"),
        (
            [f"checkpoint={config.run.dir}", f"output={tmp_path / 'y'}", "model_type=gpt9"],
            "model_type=gpt9 is not supported",
        ),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert sorted(p.name for p in folder.parent.iterdir()) == before
    assert main(["--help"]) == 0 and "checkpoint" in capsys.readouterr().out


# --- settings ------------------------------------------------------------------------------------


def test_settings_are_the_checkpoints_and_what_is_given_holds(exported, arguments):
    config, folder = exported
    resolved = compose(arguments)
    expected = dataclasses.replace(
        config.model, from_pretrained=str(folder), max_positions=64, num_kv_heads=2
    )
    assert resolved.model == expected
    assert resolved.data.tokenizer == str(folder / "tokenizer.model")
    stretched = compose(
        [
            *arguments,
            "data.sequence_length=256",
            "model.rope_scaling.type=yarn",
            "model.rope_scaling.factor=4",
            "model.norm_epsilon=1e-4",
            "data.tokenizer=null",
        ]
    )
    scaling = stretched.model.rope_scaling
    assert (scaling.type, scaling.factor, scaling.original_length) == ("yarn", 4.0, 64)
    assert stretched.model.norm_epsilon == 1e-4 and stretched.model.hidden_size == 32
    assert stretched.data.tokenizer is None
    other_preset = compose(["+experiment=llama3_8b_seq60k", *arguments, "model.rope_theta=5"])
    assert other_preset.model == dataclasses.replace(expected, rope_theta=5.0)


def test_the_checkpoints_own_stretching_stays_or_goes(exported, arguments, tmp_path):
    _, folder = exported
    other = shutil.copytree(folder, tmp_path / "stretched")
    values = json.loads((other / "config.json").read_text())
    values["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    (other / "config.json").write_text(json.dumps(values))
    arguments = [*arguments, f"model.from_pretrained={other}"]
    assert compose(arguments).model.rope_scaling.factor == 8.0
    scaling = compose([*arguments, "model.rope_scaling.factor=9"]).model.rope_scaling
    assert (scaling.type, scaling.factor) == ("linear", 9.0)
    assert compose([*arguments, "model.rope_scaling.type=none"]).model.rope_scaling.factor == 1.0


def test_what_cannot_be_started_from(exported, arguments, tmp_path):
    _, folder = exported
    for name, message in (
        (tmp_path / "nowhere", "there is no folder"),
        (" ", "model.from_pretrained is empty"),
    ):
        with pytest.raises(UserError, match=message):
            compose([*arguments, f"model.from_pretrained={name}"])
    with pytest.raises(UserError) as caught:
        compose([*arguments, "model.hiden_size=3"])
    assert "model.hiden_size is not a setting" in str(caught.value)
    with pytest.raises(UserError, match="both say what the model is"):
        compose([*arguments, "model=llama3_8b"])
    without = shutil.copytree(folder, tmp_path / "without")
    (without / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
        compose([*arguments, f"model.from_pretrained={without}"])
    train_a_new_one = [f"model.from_pretrained={without}", "data.tokenizer=null"]
    assert compose([*arguments, *train_a_new_one]).data.tokenizer is None


def test_a_run_in_the_place_of_a_checkpoint_is_told_a_command_that_works(
    exported, arguments, tmp_path, monkeypatch
):
    run = exported[0].run.dir
    with pytest.raises(UserError) as caught:
        compose([*arguments, f"model.from_pretrained={run}"])
    command = re.search(r"python -m mst_train\.export (.*) makes a checkpoint", str(caught.value))
    assert command is not None
    monkeypatch.chdir(tmp_path)
    assert main(command[1].split()) == 0
    assert (tmp_path / "FOLDER/config.json").is_file()


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(arguments, tmp_path):
    with pytest.raises(UserError, match="has the shape"):
        train(compose([*arguments, "model.intermediate_size=96"]))
    assert not (tmp_path / "run").exists()


# --- training ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16_master"])
def test_training_goes_on_from_the_weights(exported, arguments, precision):
    before, folder = exported
    config = compose([*arguments, f"precision={precision}", "optimizer.learning_rate=1e-9"])
    summary = train(config)
    start = load_pretrained(folder, dtype=torch.float32, device=CPU)
    for name, tensor in weights(config, 4).items():
        torch.testing.assert_close(
            tensor.float(), start.state_dict()[name], rtol=1e-2, atol=1e-6, msg=name
        )
    finished = json.loads(Path(before.run.dir, "summary.json").read_text())
    assert summary["val_loss"] == pytest.approx(finished["val_loss"], abs=0.1)


def test_resuming_takes_the_runs_own_weights(arguments, monkeypatch):
    whole = [*arguments, "optimizer.warmup_steps=0", "optimizer.learning_rate=1e-2"]
    config = compose(whole)
    train(config)
    expected = weights(config, 4)
    other = compose([*whole, f"run.dir={config.run.dir}-again"])
    save = CheckpointWriter.save

    def cut_off(writer, step, state):
        save(writer, step, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(other)
    monkeypatch.setattr(CheckpointWriter, "save", save)

    def never(*_):
        raise AssertionError("the pretrained weights were read again")

    monkeypatch.setattr(run_setup, "find_weights", never)
    train(other)
    for name, tensor in weights(other, 4).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("policy", ["mst", "auto"])
def test_a_longer_context_with_yarn(arguments, policy):
    config = compose(
        [
            *arguments,
            f"memory.policy={policy}",
            "data.sequence_length=256",
            "model.rope_scaling.type=yarn",
            "model.rope_scaling.factor=4",
            "optimizer.learning_rate=3e-3",
            "optimizer.warmup_steps=1",
            "train.steps=12",
        ]
    )
    summary = train(config)
    lines = Path(config.run.dir, "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert len(losses) == 12 and losses[-1] < losses[0] and summary["val_loss"] < losses[0]


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_other_families_train_and_come_back(family, arguments, tmp_path):
    forms = {
        "qwen3": {"qk_norm": "head"},
        "gemma2": {
            "norm_placement": "around",
            "norm_offset": True,
            "scale_embeddings": True,
            "activation": "gelu_tanh",
            "logit_softcap": 30.0,
            "attention_softcap": 50.0,
            "sliding_window": 16,
            "sliding_window_pattern": ["sliding", "full"],
            "tie_embeddings": True,
        },
    }
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2}
    form = ModelConfig(**sizes, **forms[family], max_positions=64)
    save_pretrained(build_model(form), tmp_path / "start", model_type=family)
    start = [
        f"model.from_pretrained={tmp_path / 'start'}",
        f"data.tokenizer={_tokenizer(arguments)}",
    ]
    config = compose([*arguments, *start])
    assert config.model.norm_placement == form.norm_placement
    train(config)
    export(config.run.dir, tmp_path / "end")
    values = json.loads((tmp_path / "end/config.json").read_text())
    assert values["model_type"] == family


def _tokenizer(arguments):
    return Path(arguments[0].partition("=")[2], "tokenizer.model")
