"""The tasks: what their texts say, read by another program; their chance; the texts to train on."""

import json
import re
from collections import Counter

import pytest
import torch

from mst_train.config import DEPTH_TASKS, TASKS, EvaluationConfig, RulerConfig
from mst_train.data import load_data, load_tokenizer
from mst_train.errors import UserError
from mst_train.evaluate import plot, tasks
from mst_train.evaluate.__main__ import main
from mst_train.evaluate.probe import Pieces, chances
from mst_train.evaluate.scores import probe_record
from mst_train.evaluate.tasks import make_probe, make_probes
from mst_train.evaluate.vocabulary import FILLER, WORDS
from mst_train.evaluate.write_tasks import main as write_tasks
from mst_train.run.train import train

RULER = RulerConfig(digits=3, needles=3, chains=2, hops=2, common_words=2, frequent_words=2)
LENGTHS = [512, 701]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The tokenizer that has a token for each word of the tasks."""
    folder = tmp_path_factory.mktemp("words")
    assert write_tasks([f"out={folder}", "documents=1", "evaluation.lengths=[99]"]) == 0
    return load_tokenizer(folder)


@pytest.fixture
def config(small_config, change):
    evaluation = EvaluationConfig(
        tasks=list(TASKS), lengths=LENGTHS, depths=[0.0, 0.6], samples=2, ruler=RULER
    )
    return change(small_config, evaluation=evaluation)


def needles(text):
    """(key, number) of each needle, in the text's order."""
    return re.findall(r"Key (\w+) (\d+)\.", text)


def answer(task, text):
    """What the question asks for, found in the text without what made it."""
    at = max(text.rfind("Which"), text.rfind("What"))
    text, question = text[:at], text[at:]
    if task == "passkey":
        found = set(re.findall(r"number is (\d+)", text))
        assert len(found) == 1
        return [*found]
    if task in ("niah_single", "niah_multikey"):
        assert len(needles(text)) == (1 if task == "niah_single" else RULER.needles)
        return [dict(needles(text))[re.search(r"belongs to (\w+)\?", question)[1]]]
    if task == "niah_multivalue":
        key = re.search(r"belong to (\w+),", question)[1]
        assert {found for found, _ in needles(text)} == {key}
        return [number for _, number in needles(text)]
    if task == "niah_multiquery":
        keys = re.search(r"belong to (.+)\?", question)[1].split(", ")
        found = dict(needles(text))
        assert sorted(keys) == sorted(found)
        return [word for key in keys for word in (key, found[key])][1:]
    if task == "vt":
        asked = re.search(r"value (\d+)", question)[1]
        values = {}
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
            values[name] = values.get(value, value)
        assert Counter(values.values()) == dict.fromkeys(values.values(), RULER.hops + 1)
        assert len(set(values.values())) == RULER.chains
        return [name for name, value in values.items() if value == asked]
    counted = Counter(re.search(r"List: (.+?)\.", text)[1].split())
    (first, n), (second, m), (_, rest) = counted.most_common(3)
    asked = [first, second]
    if task == "cwe":
        assert n == m > rest and n + m >= sum(counted.values()) // 2 - 2
        return asked  # in the order in which they stand there, as Counter has them
    assert n > m > rest
    return asked


@pytest.mark.parametrize("which", ["ours", "like_llama", "bytes_with_bos"])
def test_the_answer_is_what_the_text_says(which, config, request, change):
    tokenizer = request.getfixturevalue(which)
    if which != "ours":  # a letter is a token
        config = change(config, **{"evaluation.lengths": [1900, 2345]})
    probes = make_probes(config, tokenizer)
    assert len(probes) == 2 * 2 * (2 * 3 + 5)
    for probe in probes:
        assert len(probe.tokens) == probe.length
        assert probe.length in config.evaluation.lengths
        text = tokenizer.decode(probe.tokens).lstrip()
        expected = answer(probe.task, text)
        assert text.endswith(f" {' '.join(expected)}"), probe.task
        scored = tokenizer.decode([probe.tokens[at] for at in probe.answer]).split()
        assert scored == expected[:: 2 if probe.task == "niah_multiquery" else 1]
        assert probe.answer[-1] == len(probe.tokens) - 1
        assert (probe.depth is not None) == (probe.task in DEPTH_TASKS)


def test_what_is_asked_for_stands_at_its_depth(config, ours):
    for probe in make_probes(config, ours):
        text = ours.decode(probe.tokens)
        if probe.task in ("niah_single", "niah_multikey"):
            key = re.search(r"belongs to (\w+)\?", text)[1]
            before = text[text.index("\n") + 1 : text.index(f"Key {key}")]
            after = text[text.index(f"Key {key}") : text.index("Which number")]
            lines = [before.count("\n"), after.count("\n") - 1]
            assert lines[0] / sum(lines) == pytest.approx(probe.depth, abs=0.15)


def test_the_same_settings_make_the_same_probes(config, ours, change):
    probes = make_probes(config, ours)
    assert probes == make_probes(config, ours)
    assert len({tuple(probe.tokens) for probe in probes}) == len(probes)
    others = make_probes(change(config, **{"train.seed": 1}), ours)
    assert not {tuple(p.tokens) for p in probes} & {tuple(p.tokens) for p in others}
    fewer = make_probes(change(config, **{"evaluation.samples": 1}), ours)
    assert [p for p in probes if p in fewer] == fewer


def test_texts_to_train_on_are_drawn_with_other_seeds(config, ours, monkeypatch):
    drawn = []

    def noted(seed):
        drawn.append(seed)
        return random(seed)

    random = tasks.Random
    monkeypatch.setattr(tasks, "Random", noted)
    found = {ours.decode(probe.tokens) for probe in make_probes(config, ours)}
    probes = set(drawn)
    assert len(probes) == len(drawn) == len(found)
    drawn.clear()
    texts = list(tasks.texts(config, ours, 64, config.train.seed))
    assert len(set(drawn)) == len(texts) == 64
    assert not probes & set(drawn)
    assert not found & set(texts)
    assert all(seed.startswith("text ") for seed in drawn)
    assert not any(seed.startswith("text ") for seed in probes)


class Knows(torch.nn.Module):
    """Gives each probe's own tokens, or those that ``changed`` makes of them."""

    def __init__(self, probes, vocab_size, changed=lambda tokens: tokens):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, 1)
        self.changed = changed
        self.next = {tuple(probe.tokens[:-1]): probe.tokens[1:] for probe in probes}

    def hidden(self, tokens_BS, positions_BS):
        following = self.changed(torch.tensor(self.next[tuple(tokens_BS[0].tolist())]))
        return 20.0 * torch.nn.functional.one_hot(following, self.embedding.num_embeddings)[None]

    def head_logits(self, hidden):
        return hidden


def test_who_knows_gets_it_right_and_half_an_answer_is_none(config, ours):
    probes = make_probes(config, ours)
    record = probe_record(Knows(probes, ours.vocab_size), probes)
    for task in TASKS:
        assert record[f"{task}_accuracy"] == record[f"{task}_exact"] == 1.0
        assert record[f"{task}_loss"] < 1e-4
        depths = [0.0, 0.6] if task in DEPTH_TASKS else [None]
        places = [(p["length"], p.get("depth")) for p in record[task]]
        assert places == [(length, depth) for length in LENGTHS for depth in depths]

    def last_wrong(tokens):
        tokens[-1] = ours.eod
        return tokens

    record = probe_record(Knows(probes, ours.vocab_size, last_wrong), probes)
    for task in TASKS:
        assert record[f"{task}_exact"] == 0.0
    assert record["passkey_accuracy"] == pytest.approx(2 / 3)
    assert record["niah_multivalue_accuracy"] == pytest.approx(8 / 9)
    assert record["fwe_accuracy"] == pytest.approx(1 / 2)


def test_who_guesses_scores_chance(config, ours, change):
    config = change(config, **{"evaluation.samples": 20, "evaluation.depths": [0.5]})
    probes = make_probes(config, ours)
    generator = torch.Generator().manual_seed(0)
    pieces = Pieces(ours)
    pools = [[f" {digit}" for digit in range(10)], list(map(str, range(10)))]
    pools = [[pieces.word(text)[0] for text in pool] for pool in pools]
    pools.append([pieces.word(f" {word}")[0] for word in WORDS])
    pool_of = {token: torch.tensor(pool) for pool in pools for token in pool}

    def guess(tokens):
        for at, token in enumerate(tokens.tolist()):
            if token in pool_of:
                pool = pool_of[token]
                tokens[at] = pool[torch.randint(len(pool), (), generator=generator)]
        return tokens

    record = probe_record(Knows(probes, ours.vocab_size, guess), probes)
    for task in TASKS:
        words = task in ("vt", "cwe", "fwe")
        assert record[f"{task}_chance"] == pytest.approx(0.01 if words else 0.1)
        assert record[f"{task}_accuracy"] == pytest.approx(record[f"{task}_chance"], abs=0.06)
    assert record["passkey_exact_chance"] == pytest.approx(1e-3)
    assert record["niah_multiquery_exact_chance"] == pytest.approx(1e-9)
    assert record["cwe_exact_chance"] == pytest.approx(1e-4)


def test_chance_where_words_and_numbers_are_in_several_tokens(like_llama, bytes_with_bos):
    for tokenizer in (like_llama, bytes_with_bos):
        pieces = Pieces(tokenizer)
        assert torch.tensor(chances(pieces, " 0417")).prod() == pytest.approx(1e-4)
        for word in ("ocean", "bell", "candle"):
            odds = chances(pieces, f" {word}")
            assert torch.tensor(odds).prod() == pytest.approx(1 / len(WORDS))
    space, first, *rest = chances(Pieces(bytes_with_bos), " ocean")
    assert space == 1.0
    assert first == sum(word[0] == "o" for word in WORDS) / len(WORDS)
    assert rest[-1] == 1.0


def test_no_word_of_an_answer_stands_elsewhere(config, ours):
    assert len(set(WORDS)) == len(WORDS) == 100
    assert not set(WORDS) & set(re.findall(r"\w+", "".join(FILLER)))
    for probe in make_probes(config, ours):
        if probe.task in DEPTH_TASKS:
            text = ours.decode(probe.tokens)
            found = [word for word in re.findall(r"\w+", text) if word in WORDS]
            keys = [key for key, _ in needles(text)]
            assert set(found) == set(keys)


@pytest.mark.parametrize("task", TASKS)
def test_a_length_that_is_too_short_is_told_with_what_it_takes(task, config, ours, change):
    pieces = Pieces(ours)

    def at(length):
        generator = tasks.Random(0)
        return make_probe(task, pieces, length, 0.5, config.evaluation, generator)

    with pytest.raises(UserError, match=rf"^{task}: a text of 20 tokens has no room") as told:
        at(20)
    least = int(re.search(r"which takes (\d+) with", str(told.value))[1])
    assert at(least).length == least
    with pytest.raises(UserError, match="has no room"):
        at(least - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["documents=some"], "documents=some must be a whole number from 1"),
        (["evaluation.tasks=[vr]"], "evaluation.tasks=vr is not one of passkey, niah_single, "),
        (["evaluation.tasks=[cwe]", "evaluation.lengths=[30]"], "cwe: a text of 30 tokens has"),
        (["document=3"], "document is not a setting"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, capsys, arguments, message):
    assert write_tasks([f"out={tmp_path}", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "texts.jsonl").exists()
    assert write_tasks(arguments) == 2
    assert "out is missing: give out=FOLDER" in capsys.readouterr().err


def test_a_run_on_such_texts_and_its_evaluation(config, change, tmp_path, capsys):
    out, lengths = tmp_path / "texts", "evaluation.lengths=[150,99]"
    chosen = ["niah_multikey", "vt"]
    ruler = [f"evaluation.ruler.{key}={getattr(RULER, key)}" for key in ("digits", "hops")]
    arguments = [f"evaluation.tasks=[{','.join(chosen)}]", lengths, *ruler]
    assert write_tasks([f"out={out}", "documents=60", *arguments]) == 0
    texts = [json.loads(line)["text"] for line in (out / "texts.jsonl").read_text().splitlines()]
    assert {text.startswith("Some lines of this text") for text in texts} == {True}
    tokenizer = load_tokenizer(out)
    assert {len(tokens) for tokens in tokenizer.encode(texts)} == {99, 150}
    assert all(1 not in tokens for tokens in tokenizer.encode(texts))  # none is unknown
    run = change(
        config,
        **{
            "data.source": str(out / "texts.jsonl"),
            "data.tokenizer": str(out),
            "data.sequence_length": 160,
            "evaluation.tasks": chosen,
            "evaluation.lengths": [120],
            "evaluation.depths": [0.5],
            "evaluation.every": 2,
            "train.steps": 2,
        },
    )
    assert load_data(run.data).tokenizer.fingerprint == tokenizer.fingerprint
    summary = train(run)
    assert "step 2: niah_multikey " in capsys.readouterr().err
    assert summary["vt"][0]["length"] == 120
    given = [f"run.dir={run.run.dir}", "evaluation.lengths=[120,320]"]
    assert main(given) == 0  # longer than the run's sequences
    shown = capsys.readouterr().out
    assert re.search(r"^vt in tokens  at depth  answers right  tokens right    loss$", shown, re.M)
    assert re.search(r"^ +by chance +<1% +1%$", shown, re.M)
    saved = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert saved["tasks"] == chosen and saved["samples"] == 2 and "passkey" not in saved
    assert [place["length"] for place in saved["vt"]] == [120, 320]
    assert saved["vt"][0] == summary["vt"][0]
    assert saved["trained_sequence_length"] == 160
    assert f"{run.run.dir}/evaluation.json, evaluation.png" in shown
    assert (tmp_path / "run" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert main([*given, "evaluation.lengths=[30]"]) == 2
    assert "niah_multikey: a text of 30 tokens has no room" in capsys.readouterr().err


def test_the_picture_shows_what_was_found(config, ours):
    probes = make_probes(config, ours)
    result = probe_record(Knows(probes, ours.vocab_size), probes)
    result["niah_single"][1]["accuracy"] = 0.125
    result["vt"][1]["accuracy"] = 0.25
    figure = plot.figure({**result, "tasks": list(TASKS), "trained_sequence_length": LENGTHS[0]})
    panels = dict(zip(TASKS, figure.axes, strict=True))
    for task, axes in panels.items():
        chance = "1%" if task in ("vt", "cwe", "fwe") else "10%"
        assert axes.get_title(loc="left") == f"{task}, {chance} by chance"
        assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "701"]
        assert 0.5 in [line.get_xdata()[0] for line in axes.lines]  # between the two lengths
    shares = panels["niah_single"].images[0].get_array()
    assert shares.tolist() == [[1.0, 1.0], [0.125, 1.0]]
    assert list(panels["vt"].lines[0].get_ydata()) == [1.0, 0.25]
    (level,) = {line.get_ydata()[0] for line in panels["vt"].lines if line.get_linestyle() == "--"}
    assert level == pytest.approx(0.01)
