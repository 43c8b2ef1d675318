"""What a run is called that is given no name, and when it is the tiny experiment."""

import pytest

from mst_train.bench import config as bench
from mst_train.cli.compose import compose
from mst_train.cli.config_folders import choices
from mst_train.cli.run_name import LONGEST, run_name


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "tiny"),
        (["train.steps=40"], "tiny"),
        (["data.sequence_length=64", "model.num_layers=1"], "tiny"),
        (["run.resume=never"], "tiny"),
        (["+experiment=llama3_8b_seq60k"], "llama3_8b_seq60k"),
        (["+experiment=llama3_8b_seq60k", "data.source=mine"], "llama3_8b_seq60k"),
        (["model=llama3_8b"], "llama3_8b-stdlib"),
        (["data.source=~/my texts/"], "llama_tiny-my-texts"),
        (["data.source=/a/b/*.jsonl"], "llama_tiny-b"),
        (["data.source=owner/set", "model=qwen2_7b"], "qwen2_7b-set"),
        (["data.mixture=[{source: a/b}, {source: c}]"], "llama_tiny-b-c"),
        (["run.resume=runs/a"], "llama_tiny-stdlib-from-a"),
        (
            ["+experiment=llama3_8b_grow_64k", "run.init_from=r/a/checkpoints/step_00000010"],
            "llama3_8b_grow_64k-from-a-step_00000010",
        ),
        (["data.source=...", "model=llama3_8b"], "llama3_8b"),
        (["data.source=a", "run.name=mine"], "mine"),
    ],
)
def test_a_run_is_named_by_what_it_is(arguments, name):
    run = compose(arguments).run
    assert (run.name, run.dir) == (name, f"runs/{name}")


def test_a_checkpoint_is_part_of_the_name():
    given = {"model.from_pretrained": "meta-llama/Llama-3.2-1B"}
    tree = {"data": {"source": "texts"}}
    assert run_name(tree, {"model": "llama_tiny"}, given) == "Llama-3.2-1B-texts"
    chosen = {"model": "llama_tiny", "experiment": "mine"}
    assert run_name(tree, chosen, given) == "mine-Llama-3.2-1B"
    assert (
        len(run_name({"data": {"source": "a" * 400}}, chosen | {"experiment": None}, {})) == LONGEST
    )


@pytest.mark.parametrize("argument", ["model=llama3_8b", "data.source=mine", "run.init_from=a"])
def test_the_tiny_experiment_stays_at_home(argument):
    tiny, other = compose([]), compose([argument])
    assert tiny.train.steps == 80 and tiny.optimizer.learning_rate == 3e-3
    assert other.train.steps == 1000 and other.optimizer.learning_rate == 3e-4


@pytest.mark.parametrize("name", [*choices("bench")[:2]])
def test_a_bench_is_not_the_tiny_experiment(name):
    config = bench.read([f"+bench={name}"])
    assert config.train.steps == 1000 and config.run.name != "tiny"
