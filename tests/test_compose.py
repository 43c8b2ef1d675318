"""From the command line to a configuration."""

import tomllib
from pathlib import Path

import pytest

from mst_train.compose import choices, compose, config_folder, describe, known_keys
from mst_train.config import Config
from mst_train.errors import UserError


def problems(*arguments):
    with pytest.raises(UserError) as caught:
        compose(arguments)
    return caught.value.problems


def test_without_arguments_it_is_the_tiny_experiment():
    config = compose([])
    assert config == compose(["+experiment=tiny"]) == compose(["experiment=tiny"])
    assert (config.run.name, config.run.dir) == ("tiny", "runs/tiny")
    assert config.memory.policy == "mst"


@pytest.mark.parametrize("group", [p.name for p in config_folder().iterdir() if p.is_dir()])
def test_every_group_has_choices_that_compose(group):
    assert choices(group)
    heads_for_all = ["model=llama3_8b"] if group == "parallel" else []
    for name in choices(group):
        compose([f"{group}={name}", *heads_for_all])


def test_the_paper_experiment():
    config = compose(["+experiment=llama3_8b_seq60k"])
    assert config.data.sequence_length == 60 * 1024
    assert (config.precision, config.memory.policy) == ("bf16", "mst")
    model = config.model
    assert (model.hidden_size, model.intermediate_size, model.vocab_size) == (4096, 14336, 128256)
    assert (model.num_layers, model.num_heads, model.num_kv_heads) == (32, 32, 8)


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_the_papers_experiments_on_several_gpus(gpus):
    names = [name for name in choices("experiment") if name.endswith(f"_{gpus}gpu")]
    assert len(names) == 2
    for name in names:
        config = compose([f"+experiment={name}"])
        assert (config.parallel.sequence_parallel, config.parallel.zero_stage) == (gpus, 0)
        changed = compose([f"+experiment={name}", "parallel=zero_3"]).parallel
        assert (changed.sequence_parallel, changed.zero_stage) == (1, 3)


def test_every_group_is_installed():
    """Not only in a checkout."""
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    installed = project["tool"]["setuptools"]["data-files"]
    for folder in config_folder().iterdir():
        if folder.is_dir():
            group = folder.name
            assert installed[f"share/mst_train/configs/{group}"] == [f"configs/{group}/*.yaml"]


def test_overrides_win_over_experiment_and_groups():
    config = compose(
        [
            "+experiment=tiny",
            "model=llama2_7b",
            "model.num_layers=2",
            "memory.mlp_chunk_tokens=300",
            "optimizer.max_grad_norm=null",
            "optimizer.learning_rate=1",
            "run.name=other",
        ]
    )
    assert (config.model.hidden_size, config.model.num_layers) == (4096, 2)
    assert config.memory.mlp_chunk_tokens == 300
    assert config.optimizer.max_grad_norm is None
    assert config.optimizer.learning_rate == 1.0
    assert config.run.dir == "runs/other"


def test_values_that_hydra_would_want_quoted():
    config = compose(["data.source=~/my 'texts'/[a-z]*.txt", "run.name=日本", "train.steps=1e3"])
    assert config.data.source == "~/my 'texts'/[a-z]*.txt"
    assert config.run.dir == "runs/日本"
    assert config.train.steps == 1000


def test_one_message_lists_every_problem():
    found = problems("train.stepz=4", "data.sequence_length=abc", "model.hiden_size=3")
    assert sorted(found) == [
        "data.sequence_length=abc: Value 'abc' of type 'str' could not be converted to Integer",
        "model.hiden_size is not a setting: did you mean model.hidden_size?",
        "train.stepz is not a setting: did you mean train.steps?",
    ]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train", "cannot read 'train': expected key=value"),
        ("run=here", "run is a group of settings: set one of run.name, run.dir, run.resume"),
        ("model=llama3_9b", "model=llama3_9b is not known: did you mean llama3_8b?"),
        ("+experiment=x", "experiment=x is not known: there are"),
        ("+foo.bar=1", "foo.bar is not a setting"),
        ("model.num_heads=[1]", "model.num_heads=[1]: "),
        ("memory.mlp_chunk_tokens=1.5", "memory.mlp_chunk_tokens=1.5: "),
        ("run.dir=null", "run.dir=None: "),
        ("run.dir=${nope}", "run.dir: Interpolation key 'nope' not found"),
        ("train.steps=0", "train.steps=0 must be at least 1"),
        ("train.steps=1,2", "cannot use 'train.steps=1,2': give a setting one value"),
        ("~train.steps", "cannot use '~train.steps': give a setting one value"),
        ("train.seed=99999999999999999999999999", "train.seed=99999999999999999999999999 must be"),
        ("--confg", "cannot read '--confg': expected key=value"),
    ],
)
def test_refusals(argument, message):
    (found,) = problems(argument)
    assert found.startswith(message)


def test_description_holds_every_setting_and_composes_again():
    config = compose(["train.steps=7", "run.name=x"])
    text = describe(config)
    assert "steps: 7" in text
    assert all(key.rpartition(".")[2] + ":" in text for key in known_keys())


def test_nothing_is_left_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose([])
    assert list(tmp_path.iterdir()) == []


def test_configuration_is_frozen():
    config = compose([])
    assert isinstance(config, Config)
    with pytest.raises(AttributeError):
        config.train.steps = 1
