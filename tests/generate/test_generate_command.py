"""python -m mst_train.generate: the text of a run, of what is exported of it, and refusals."""

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch

from mst_train.cli.compose import compose
from mst_train.data import load_tokenizer
from mst_train.export import export
from mst_train.generate.__main__ import main
from mst_train.generate.sample import Sampler
from mst_train.run.train import train

PROMPT = "a text, [of] some='words'"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus, cache):
    """(A run of one step whose weights are large enough to say different things, its export)."""
    folder = tmp_path_factory.mktemp("trained")
    config = compose(
        [
            f"run.dir={folder / 'run'}",
            f"data.source={corpus}",
            f"data.cache_dir={cache}",
            "data.sequence_length=64",
            "data.tokenizer_vocab_size=512",
            "model.vocab_size=512",
            "model.hidden_size=32",
            "model.intermediate_size=88",
            "model.num_layers=2",
            "model.num_heads=4",
            "model.initializer_std=0.3",
            "logging=wandb_disabled",
            "train.steps=1",
            "train.eval_every=0",
        ]
    )
    train(config)
    export(config.run.dir, folder / "model")
    return Path(config.run.dir), folder / "model"


@pytest.fixture
def generated(trained, capsys):
    """generated(*arguments): what the command prints of the run."""

    def call(*arguments, model=f"run.dir={trained[0]}"):
        assert main([model, *arguments]) == 0
        return capsys.readouterr().out

    return call


def test_the_text_of_a_run_is_transformers_of_its_export(trained, generated):
    transformers = pytest.importorskip("transformers")
    run, folder = trained
    arguments = f"prompt={PROMPT}", "temperature=0", "new_tokens=40"
    text = generated(*arguments)
    assert generated(*arguments, model=f"run.dir={run}/checkpoints/step_00000001") == text
    assert generated(*arguments, model=f"model.from_pretrained={folder}") == text
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = load_tokenizer(folder)
    prompt = torch.tensor(tokenizer.encode([PROMPT]))
    following = theirs.generate(prompt, do_sample=False, max_new_tokens=40)[0].tolist()
    assert len(set(following[prompt.shape[1] :])) > 5
    assert text == tokenizer.decode(following)[len(PROMPT) :] + "\n"


def test_seeds_lengths_and_where_the_prompt_is_from(generated, monkeypatch):
    short = generated(f"prompt={PROMPT}", "new_tokens=5")
    long = generated(f"prompt={PROMPT}", "new_tokens=30", "temperature=1")
    assert long.startswith(short.removesuffix("\n").removesuffix("\N{REPLACEMENT CHARACTER}"))
    assert len(long) > len(short)
    assert generated(f"prompt={PROMPT}", "new_tokens=30", "seed=1") != long
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert generated("prompt=-", "new_tokens=30") == long
    assert generated("prompt=", "new_tokens=30", "top_p=0.9") not in (long, "\n")


def test_it_ends_where_a_document_does_or_with_what_there_is(trained, generated, monkeypatch):
    tokenizer = load_tokenizer(trained[1])
    snowman = tokenizer.encode(["\N{SNOWMAN}"])[0]
    following = iter([*snowman, tokenizer.eod, *snowman, *snowman])
    monkeypatch.setattr(Sampler, "__call__", lambda *_: next(following))
    assert generated("prompt=x") == "\N{SNOWMAN}\n"
    assert generated("prompt=x", "new_tokens=4") == "\N{SNOWMAN}\N{REPLACEMENT CHARACTER}\n"


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ([], ["prompt is missing"]),
        (["hello"], ["cannot read 'hello': expected key=value", "prompt is missing"]),
        (["prompt=\udcff"], ["prompt is no text"]),
        (
            ["prompt=x", "new_tokens=1.5", "temperature=-1", "top_p=nan", "seed=a"],
            [
                "new_tokens=1.5 must be a whole number from 1 to 2147483648",
                "temperature=-1 must be a number from 0 to 1000",
                "top_p=nan must be a number from 0 to 1",
                "seed=a must be a whole number from 0",
            ],
        ),
        (["prompt=x", "temprature=1"], ["temprature is not a setting: did you mean temperature?"]),
        (["prompt=x", "run.dir=/nowhere"], ["run.dir=/nowhere is no place with a whole checkpo"]),
        (["prompt=x", "model.num_layers=3"], ["cannot use model.num_layers=3: the model and its"]),
        (["prompt=x", "model.from_pretrained=x"], ["both say which model: leave one out"]),
    ],
)
def test_what_is_refused(trained, capsys, arguments, messages):
    assert main([f"run.dir={trained[0]}", *arguments]) == 2
    output = capsys.readouterr()
    assert not output.out
    for message in messages:
        assert message in output.err


def test_a_tokenizer_that_is_not_the_models(trained, corpus, like_llama, tmp_path, capsys, caplog):
    run, folder = trained
    other = like_llama.save(tmp_path / "other.model")
    assert main([f"run.dir={run}", "prompt=x", f"data.tokenizer={tmp_path / 'other.model'}"]) == 0
    assert "was trained with another tokenizer than this one" in caplog.text
    assert main(["model.from_pretrained=null", "prompt=x"]) == 2
    assert "model.from_pretrained=null names no checkpoint" in capsys.readouterr().err
    small = shutil.copytree(folder, tmp_path / "small")
    config = (small / "config.json").read_text()
    (small / "config.json").write_text(config.replace('"vocab_size": 512', '"vocab_size": 300'))
    assert main([f"model.from_pretrained={small}", "prompt=x"]) == 2
    assert "knows 300 token ids, and the tokenizer has 512" in capsys.readouterr().err
    assert other.vocab_size == 400
