"""Runs of mixtures of experts: every optimizer, resuming, what is exported of them."""

import json
from pathlib import Path

import pytest
import torch

import mst_train.run.train as training
from mst_train.__main__ import main
from mst_train.data import load_tokenizer
from mst_train.evaluate.checkpoint import evaluate_trained
from mst_train.export import export
from mst_train.generate.__main__ import main as generate

IN_BACKWARD = ["optimizer.in_backward=true", "optimizer.max_grad_norm=null"]
OPTIMIZERS = {
    "adamw": [],
    "in the backward": IN_BACKWARD,
    "muon": ["optimizer.name=muon", "precision=bf16_master", "train.accumulation_steps=2"],
    "muon in the backward": ["optimizer.name=muon", *IN_BACKWARD],
}


@pytest.fixture
def arguments(corpus, cache):
    return [
        f"data.source={corpus}",
        f"data.cache_dir={cache}",
        "data.sequence_length=100",
        "data.validation_fraction=0.05",
        "data.tokenizer_vocab_size=512",
        "model.vocab_size=512",
        "model.hidden_size=32",
        "model.intermediate_size=24",
        "model.num_layers=2",
        "model.num_experts=5",
        "model.balance_loss=0.01",
        "model.router_z_loss=0.001",
        "optimizer.learning_rate=3e-3",
        "optimizer.warmup_steps=2",
        "memory.mlp_chunk_tokens=32",
        "memory.head_chunk_tokens=32",
        "memory.block_chunk_tokens=40",
        "train.steps=6",
        "train.eval_every=3",
        "train.eval_sequences=4",
        "checkpoint.every=2",
        "logging=wandb_disabled",
    ]


def losses(folder):
    records = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def test_it_learns(arguments, tmp_path):
    longer = ["train.steps=40", "checkpoint.every=40", "train.eval_every=0"]
    assert main([*arguments, *longer, f"run.dir={tmp_path / 'run'}"]) == 0
    curve = losses(tmp_path / "run")
    assert curve[40] < curve[1] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resuming_continues_bit_for_bit(arguments, optimizer, tmp_path, monkeypatch):
    arguments = [*arguments, *OPTIMIZERS[optimizer]]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*arguments, f"run.dir={whole}"]) == 0
    step = training.train_step

    def stop_at_four(*given):
        if len(losses(cut)) == 4:
            raise KeyboardInterrupt
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", stop_at_four)
        assert main([*arguments, f"run.dir={cut}"]) == 130
    assert len(losses(cut)) == 4
    assert main([*arguments, f"run.dir={cut}"]) == 0
    assert losses(cut) == losses(whole)
    a, b = (torch.load(run / "checkpoints/step_00000006/model.pt") for run in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_policies_give_the_same_curve(arguments, tmp_path):
    curves = []
    for policy in ("vanilla", "recompute", "mst"):
        run = tmp_path / policy
        assert main([*arguments, f"memory.policy={policy}", f"run.dir={run}"]) == 0
        curves.append(losses(run))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.parametrize(
    ("form", "model_type"),
    [
        ([], "mixtral"),
        (["model.qk_norm=head", "model.normalize_experts=false"], "qwen3_moe"),
        (["model.qk_norm=projection", "model.experts_per_token=3"], "olmoe"),
    ],
)
def test_what_a_run_has_learned_is_transformers_of_its_export(
    arguments, form, model_type, tmp_path, capsys
):
    transformers = pytest.importorskip("transformers")
    run, folder = tmp_path / "run", tmp_path / "model"
    large = ["model.initializer_std=0.3", "train.steps=1", "train.eval_every=0"]
    assert main([*arguments, *form, *large, f"run.dir={run}"]) == 0
    export(run, folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type

    prompt = "prompt=a text", "temperature=0", "new_tokens=30"
    capsys.readouterr()
    texts = []
    for model in (f"run.dir={run}", f"model.from_pretrained={folder}"):
        assert generate([model, *prompt]) == 0
        texts.append(capsys.readouterr().out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", experts_implementation="eager"
    )
    tokenizer = load_tokenizer(folder)
    tokens = torch.tensor(tokenizer.encode(["a text"]))
    following = theirs.generate(tokens, do_sample=False, max_new_tokens=30)[0].tolist()
    assert len(set(following[tokens.shape[1] :])) > 5
    assert texts == [tokenizer.decode(following).removeprefix("a text") + "\n"] * 2

    evaluated = [
        evaluate_trained([model, *data])[0]["val_loss"]
        for model, data in (
            (f"run.dir={run}", []),
            (f"model.from_pretrained={folder}", [*arguments[:4], "train.eval_sequences=4"]),
        )
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-6)


def test_a_run_goes_on_from_a_checkpoint_of_transformers(arguments, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        output_router_logits=True,
        router_aux_loss_coef=0.25,
    )
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "theirs")
    others = [a for a in arguments if not a.startswith("model.")]
    start = [f"model.from_pretrained={tmp_path / 'theirs'}", "data.tokenizer=null"]
    for name, changed in {"as it is": [], "plain": ["model.balance_loss=0"]}.items():
        assert main([*others, *start, *changed, f"run.dir={tmp_path / name}"]) == 0
    more = losses(tmp_path / "as it is")[1] - losses(tmp_path / "plain")[1]
    assert more == pytest.approx(0.25 * 2, rel=0.1)  # each token is sent to two experts
