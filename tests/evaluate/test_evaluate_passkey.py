"""Passkey retrieval: its texts, its scores, and the command that evaluates a checkpoint."""

import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mst_train.cli.compose import compose
from mst_train.config import EvaluationConfig, ModelConfig
from mst_train.data import Vocabulary, load_data
from mst_train.errors import UserError
from mst_train.evaluate.__main__ import main
from mst_train.evaluate.passkey import passkey
from mst_train.evaluate.probe import Pieces
from mst_train.evaluate.scores import probe_record
from mst_train.evaluate.tasks import make_probes
from mst_train.model import build_model
from mst_train.optim import build_optimizer
from mst_train.run.train import train

LENGTH = 512


@pytest.fixture
def config(small_config, change):
    evaluation = EvaluationConfig(lengths=[400, LENGTH], depths=[0, 0.5, 1])
    return change(small_config, evaluation=evaluation, **{"data.sequence_length": LENGTH})


@pytest.fixture
def ours(config):
    return load_data(config.data).tokenizer


def make_probe(tokenizer, length, depth, seed):
    return passkey(Pieces(tokenizer), length, depth, 5, random.Random(f"{seed} {length} {depth:g}"))


@pytest.mark.parametrize("which", ["ours", "like_llama", "bytes_with_bos"])
def test_the_number_is_hidden_where_it_should_be(which, request):
    tokenizer = request.getfixturevalue(which)
    for depth in (0.0, 0.3, 1.0):
        probe = make_probe(tokenizer, LENGTH, depth, seed=3)
        assert len(probe.tokens) == probe.length == LENGTH
        text = tokenizer.decode(probe.tokens)
        numbers = re.findall(r"\d+", text)
        assert len(numbers) == 3
        assert len(set(numbers)) == 1
        assert len(numbers[0]) == 5
        assert text.startswith("Somewhere in this text")
        assert text.endswith(f"What is the number? The number is {numbers[0]}")
        answer = tokenizer.decode([probe.tokens[at] for at in probe.answer])
        assert answer.strip() == numbers[0]
        before = text.index("The number is")
        rest = len(text) - len("What is the number? The number is 12345")
        assert before / rest == pytest.approx(depth, abs=0.3)
        if depth:
            assert text[before - 1].isspace()
        # The answer's tokens are there, to be copied, as they are to be given.
        assert probe.answer == list(range(probe.answer[0], LENGTH))
        start = " ".join(map(str, probe.tokens[: probe.answer[0]]))
        assert " ".join(map(str, probe.tokens[probe.answer[0] :])) in start


def test_the_same_settings_make_the_same_probes(config, ours, change):
    probes = make_probes(config, ours)
    assert [(p.length, p.depth) for p in probes] == [
        (length, depth) for length in (400, LENGTH) for depth in (0, 0.5, 1)
    ]
    assert probes == make_probes(config, ours)
    assert len({tuple(p.tokens[p.answer[0] :]) for p in probes}) == len(probes)
    assert probes != make_probes(change(config, **{"train.seed": 1}), ours)
    automatic = make_probes(change(config, **{"evaluation.lengths": []}), ours)
    assert {probe.length for probe in automatic} == {LENGTH}


class Bytes(Vocabulary):
    """Each byte of a text is a token."""

    model = b"bytes"

    def encode_arrays(self, texts, continuing=()):
        yield from (np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts)

    def decode(self, tokens):
        return bytes(tokens).decode()


def test_the_probes_of_old_settings_are_as_they_were(change):
    """By their old names, with the tokens that they had when there was no other task."""
    old = compose(["evaluation.passkey_lengths=[400,700]", "train.seed=0"])
    probes = make_probes(change(old, **{"data.sequence_length": 1024}), Bytes(256, 0))
    found = repr([(probe.tokens, len(probe.answer), probe.depth) for probe in probes])
    assert hashlib.sha256(found.encode()).hexdigest() == (
        "e58c5a2e20557ff72550cbc488cf34df6f5ddb64fbed5c88dfcb15db8f3df701"
    )
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1}
    model = build_model(ModelConfig(**sizes, num_heads=2, num_kv_heads=1), seed=0)
    record = probe_record(model, probes[:2])
    assert record["passkey_accuracy"] == 0.0
    assert record["passkey_loss"] == pytest.approx(5.538584391276042, rel=1e-5)
    losses = [5.491854349772136, 5.585314432779948]
    for probe, depth, loss in zip(record["passkey"], (0.0, 0.25), losses, strict=True):
        assert (probe["length"], probe["depth"], probe["accuracy"]) == (400, depth, 0.0)
        assert probe["loss"] == pytest.approx(loss, rel=1e-5)


def test_what_cannot_be_probed_is_refused(config, ours):
    with pytest.raises(UserError, match=r"passkey: a text of 20 tokens has no room .* \d+ with"):
        make_probe(ours, 20, 0.5, seed=0)
    with pytest.raises(UserError, match="no tokenizer to write the texts"):
        make_probes(config, Vocabulary(100, 0))


class Copier(torch.nn.Module):
    """Predicts what followed the last time that the three tokens before were there."""

    def __init__(self, vocab_size):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, 1)

    def hidden(self, tokens_BS, positions_BS):
        tokens = tokens_BS[0].tolist()
        followers, predicted = {}, []
        for place in range(len(tokens)):
            before = tuple(tokens[max(place - 2, 0) : place + 1])
            predicted.append(followers.get(before, 0))
            followers[tuple(tokens[max(place - 3, 0) : place])] = tokens[place]
        hidden = torch.nn.functional.one_hot(
            torch.tensor([predicted]), self.embedding.num_embeddings
        )
        return 20.0 * hidden

    def head_logits(self, hidden):
        return hidden


def test_who_copies_gets_it_right(config, ours):
    record = probe_record(Copier(ours.vocab_size), make_probes(config, ours))
    assert record["passkey_accuracy"] == 1.0
    assert record["passkey_loss"] < 1e-4
    assert [p["accuracy"] for p in record["passkey"]] == [1.0] * 6


def test_a_model_before_and_after_it_has_learned_the_number(config, ours):
    probe = make_probe(ours, 256, 0.5, seed=0)
    model = build_model(config.model)
    before = probe_record(model, [probe])["passkey"][0]
    assert before["accuracy"] < 0.5
    assert before["loss"] > 4
    optimizer = build_optimizer(model, config.optimizer, master_weights=False)
    tokens = torch.tensor([probe.tokens])
    for _ in range(40):
        optimizer.set_learning_rate(1e-2)
        loss_sum, valid = model(tokens[:, :-1], tokens[:, 1:])
        (loss_sum / valid).backward()
        optimizer.step()
    after = probe_record(model, [probe])["passkey"][0]
    assert after["accuracy"] == 1.0
    assert after["loss"] < 0.5
    assert after == probe_record(model, [probe])["passkey"][0]


def test_the_run_records_it_and_the_command_says_the_same(config, change, capsys, caplog):
    caplog.set_level("INFO", "mst_train")
    config = change(
        config,
        **{"train.steps": 4, "train.eval_every": 2, "evaluation.every": 3},
    )
    summary = train(config)
    folder = Path(config.run.dir)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    probed = [r for r in records if "passkey" in r]
    assert [r["step"] for r in probed] == [3, 4]
    assert summary["passkey"] == probed[-1]["passkey"]
    assert json.loads((folder / "environment.json").read_text())["versions"]["torch"]
    assert json.loads((folder / "prediction.json").read_text())["sequence_length"] == LENGTH

    arguments = [f"run.dir={folder}", "memory.head_chunk_tokens=32"]
    caplog.clear()
    assert main(arguments) == 0
    (said,) = [r.getMessage() for r in caplog.records if "evaluating" in r.getMessage()]
    lengths = [probe["length"] for probe in summary["passkey"]]
    assert said.startswith(f"evaluating {folder}/checkpoints/step_00000004 on the ")
    assert said.endswith(
        f": validation, 4 sequences of {LENGTH:,} tokens; passkey, {len(lengths)} texts of "
        f"{sum(lengths):,} tokens together"
    )
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["step"] == 4
    for key in ("val_loss", "val_loss_by_position", "passkey", "passkey_accuracy"):
        assert result[key] == summary[key], key
    assert sum(result["val_tokens"].values()) == 4 * LENGTH
    output = capsys.readouterr().out
    assert re.search(r"^ +256 +\d\.\d{4} +1,024$", output, re.MULTILINE)
    assert re.search(rf"^ +{LENGTH} +50% +\d+% +\d+% +\d+\.\d{{4}}$", output, re.MULTILINE)
    assert f"Written: {folder}/evaluation.json, evaluation.png" in output

    assert main([*arguments, "evaluation.lengths=[450]"]) == 0
    result = json.loads((folder / "evaluation.json").read_text())
    assert {probe["length"] for probe in result["passkey"]} == {450}

    earlier = folder / "checkpoints" / "step_00000002"
    assert main([f"run.dir={earlier}"]) == 0
    result = json.loads((earlier / "evaluation.json").read_text())
    (validated,) = [r for r in records if r["step"] == 2 and "val_loss" in r]
    assert (result["step"], result["val_loss"]) == (2, validated["val_loss"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is no place with a whole checkpoint"),
        (["model.num_layers=3"], "cannot use model.num_layers=3: the model and its type are"),
        (["run.dir=/nowhere/at/all"], "run.dir=/nowhere/at/all is no place with a whole"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(tmp_path, capsys, arguments, message):
    assert main([f"run.dir={tmp_path}", *arguments]) == 2
    assert message in capsys.readouterr().err
