"""Several values of a setting: a run for each, one after the other."""

import json
import signal
import subprocess
import sys

import pytest

from mst_train.__main__ import main
from mst_train.cli.sweep import points
from mst_train.errors import UserError


def names(*arguments):
    return [point.config.run.name for point in points(arguments)]


def test_each_combination_is_a_run_of_its_own():
    assert points(["train.steps=3", "data.mixture=[{source: a}, {source: b}]"]) == []
    found = points(["optimizer.learning_rate=1e-3,3e-3", "train.steps=2", "train.seed=1,2"])
    assert [p.config.run.name for p in found] == [
        "tiny-learning_rate_0.001-seed_1",
        "tiny-learning_rate_0.001-seed_2",
        "tiny-learning_rate_0.003-seed_1",
        "tiny-learning_rate_0.003-seed_2",
    ]
    values = [(p.config.optimizer.learning_rate, p.config.train.seed) for p in found]
    assert values == [(1e-3, 1), (1e-3, 2), (3e-3, 1), (3e-3, 2)]
    assert {p.config.train.steps for p in found} == {2}
    assert names("run.name=mine", "data.source=a/x,'b c/y'") == ["mine-source_x", "mine-source_y"]
    assert names("model=llama3_8b,qwen2_7b") == [
        "llama3_8b-stdlib-model_llama3_8b",
        "qwen2_7b-stdlib-model_qwen2_7b",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.seed=1,2", "run.dir=here"], "would meet in here: leave run.dir out"),
        (["data.source=a/x,b/x"], "would meet in runs/"),
        (["train.seed=1,x"], "train.seed=x is not a whole number"),
        (["train.seed=1,2", "train.stepz=3"], "did you mean train.steps?"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_run(arguments, message):
    with pytest.raises(UserError) as caught:
        points(arguments)
    assert message in str(caught.value)


def test_not_under_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="give each setting one value"):
        points(["train.seed=1,2"])


@pytest.fixture
def scripted(monkeypatch):
    """Puts a script in the place of each run, and returns the names of those that were started."""
    started = []
    popen = subprocess.Popen

    def script(text):
        def start(command):
            started.append(command[-1].removeprefix("run.name="))
            return popen([sys.executable, "-c", text.replace("SEED", command[-2][-1])])

        monkeypatch.setattr("mst_train.cli.sweep.subprocess.Popen", start)
        return started

    return script


def test_one_that_fails_does_not_stop_the_others(scripted):
    started = scripted("raise SystemExit({1: 0, 2: 3, 3: 4}[SEED])")
    assert main(["train.steps=1", "train.seed=1,2,3"]) == 3
    assert started == ["tiny-seed_1", "tiny-seed_2", "tiny-seed_3"]


def test_a_signal_stops_the_run_and_the_sweep(scripted):
    """It comes to the sweep, which hands it on."""
    handler = signal.getsignal(signal.SIGTERM)
    started = scripted(
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(143))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)"
    )
    assert main(["train.steps=1", "train.seed=1,2"]) == 143
    assert started == ["tiny-seed_1"]
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.slow
def test_real_runs(tmp_path, monkeypatch, corpus, cache):
    monkeypatch.chdir(tmp_path)
    small = [f"data.source={corpus}", f"data.cache_dir={cache}", "data.tokenizer_vocab_size=512"]
    small += ["model.num_layers=1", "model.hidden_size=32", "data.sequence_length=64"]
    assert main([*small, "train.steps=2", "train.seed=1,2", "run.name=x"]) == 0
    losses = [
        json.loads((tmp_path / f"runs/x-seed_{seed}/summary.json").read_text())["loss"]
        for seed in (1, 2)
    ]
    assert losses[0] != losses[1]
