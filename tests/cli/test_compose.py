"""From the command line to a configuration."""

import datetime
import itertools
import shutil
import tomllib
from pathlib import Path

import pytest

import mst_train.cli.config_folders
from mst_train.bench import config as bench
from mst_train.cli.compose import (
    compose,
    describe,
    recompose,
    warn_of_unused,
)
from mst_train.cli.config_folders import choices, config_folders
from mst_train.cli.settings import Settings, _warn_once
from mst_train.config import Config, validate
from mst_train.errors import UserError
from mst_train.plan import config as plan
from mst_train.prepare import config as prepare
from mst_train.report import config as report

(CONFIGS,) = config_folders()
RUNS = Settings(Config)
"""A run's."""


def problems(*arguments):
    with pytest.raises(UserError) as caught:
        compose(arguments)
    return caught.value.problems


def test_without_arguments_it_is_the_tiny_experiment():
    config = compose([])
    assert config == compose(["+experiment=tiny"]) == compose(["experiment=tiny"])
    assert (config.run.name, config.run.dir) == ("tiny", "runs/tiny")
    assert config.memory.policy == "mst"


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(p.name, marks=[pytest.mark.slow] if p.name == "experiment" else [])
        for p in CONFIGS.iterdir()
        if p.is_dir()
    ],
)
def test_every_group_has_choices_that_compose(group):
    assert choices(group)
    others = {"parallel": ["model=llama3_8b"], "experiment": ["model.from_pretrained=null"]}
    for name in choices(group):
        compose([f"{group}={name}", *others.get(group, [])])


def test_the_paper_experiment():
    config = compose(["+experiment=llama3_8b_seq60k"])
    assert config.data.sequence_length == 60 * 1024
    assert (config.precision, config.memory.policy) == ("bf16", "mst")
    model = config.model
    assert (model.hidden_size, model.intermediate_size, model.vocab_size) == (4096, 14336, 128256)
    assert (model.num_layers, model.num_heads, model.num_kv_heads) == (32, 32, 8)


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_the_papers_experiments_on_several_gpus(gpus):
    names = [name for name in choices("experiment") if name.endswith(f"0k_{gpus}gpu")]
    assert len(names) == 2
    for name in names:
        config = compose([f"+experiment={name}"])
        assert (config.parallel.sequence_parallel, config.parallel.zero_stage) == (gpus, 0)
        changed = compose([f"+experiment={name}", "parallel=zero_3"]).parallel
        assert (changed.sequence_parallel, changed.zero_stage) == (1, 3)


def test_every_group_is_installed():
    """Not only in a checkout."""
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())
    installed = project["tool"]["setuptools"]["data-files"]
    for folder in CONFIGS.iterdir():
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
        "data.sequence_length=abc is not a whole number",
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
        ("model.num_heads=[1]", "model.num_heads=[1] is not a whole number"),
        ("memory.mlp_chunk_tokens=1.5", "memory.mlp_chunk_tokens=1.5 is not a whole number"),
        ("run.dir=null", "run.dir=null: it has to have a value"),
        ("run.dir=${nope}", "run.dir=${nope}: Interpolation key 'nope' not found"),
        ("train.steps=0", "train.steps=0 must be at least 1"),
        ("train.steps=1,2", "cannot use 'train.steps=1,2': give a setting one value"),
        (
            "data.text_suffixes=.a",
            "data.text_suffixes=.a is not a list: put it in brackets, data.text_suffixes=[.a]",
        ),
        (
            "data.text_suffixes=.a,.b",
            "cannot use 'data.text_suffixes=.a,.b': give a setting one value (null for none), and "
            "several in brackets: data.text_suffixes=[.a,.b]",
        ),
        ("~train.steps", "cannot use '~train.steps': give a setting one value"),
        (
            "train.seed=99999999999999999999999999",
            "train.seed=99999999999999999999999999 is too large",
        ),
        ("--confg", "cannot read '--confg': expected key=value: --help lists the settings"),
        ("optimizer.lr=1", "optimizer.lr is not a setting: did you mean optimizer.learning_rate?"),
        ("train.lr=1", "train.lr is not a setting: did you mean optimizer.learning_rate?"),
        ("train.bs=1", "train.bs is not a setting: see python -m mst_train --help"),
        ("data.lenght=9", "data.lenght is not a setting: did you mean data.sequence_length?"),
        ("model.layers=9", "model.layers is not a setting: did you mean model.num_layers?"),
        ("train.warmup_steps=9", "train.warmup_steps is not a setting: did you mean optimizer.war"),
        ("hydra.run.dir=x", "cannot use 'hydra.run.dir=x': Hydra composes settings here"),
        ("hydra.mode=MULTIRUN", "cannot use 'hydra.mode=MULTIRUN': Hydra composes settings"),
        ("hydra.searchpath=", "cannot use 'hydra.searchpath=': Hydra composes settings here"),
        ("model@x=llama3_8b", "cannot use 'model@x=llama3_8b': expected key=value"),
        ("model={}", "model={} is not known: there are"),
        ("train={}", "train is a group of settings: set one of train.steps"),
        ("+experiment=null", "experiment=null is not known: there are"),
        ("+experiment=../model/llama3_8b", "experiment=../model/llama3_8b: give one experiment"),
        ("train.steps=" + "9" * 5000, "cannot read 'train.steps=9999"),
        ("run.name=" + "[" * 500, "cannot read 'run.name=[[[[[[[["),
        ("run.name=" + "${" * 500, "cannot read 'run.name=${${${$"),
        ("a." * 3000 + "b=1", "a.a.a.a."),
        ("run.name=${", "run.name='${': "),
        ("run.name='${oc.decode:\"{a: 1}\"}'", "run.name={'a': 1} is not a text"),
        ("run.name=a\0b", "run.name=a\\x00b has control characters"),
        ("run.name=\udcff", "run.name=\\udcff has control characters, or bytes that are not UTF-8"),
        ("run.name=" + "x" * 300, "run.name=xxxx"),
        ("model.from_pretrained=" + "x" * 300, "model.from_pretrained=xxxx"),
        ("model.from_pretrained=~nobody9/x", "~nobody9/x: there is no such home folder"),
        ("data.cache_dir=", "data.cache_dir is empty: give it a value"),
        ("model.sliding_window_pattern=[[full]]", "model.sliding_window_pattern[0]=['full'] is"),
        ("data.text_suffixes=[[a]]", "data.text_suffixes[0]=['a'] is not a text"),
        ("data.mixture=[{source: x, sauce: y}]", "data.mixture[0].sauce is not a setting: did"),
        ("train.spike_window=1e20", "train.spike_window=1e+20 is too large"),
        ("train.micro_batch_size=1e20", "train.micro_batch_size=1e+20 is too large"),
        ("train.micro_batch_size=1000000", "train.micro_batch_size=1000000, train.accumulation_"),
        ("train.accumulation_steps=1e9", "train.micro_batch_size=1, train.accumulation_steps=1"),
        ("data.tokenizer_vocab_size=2147483648", "data.tokenizer_vocab_size=2147483648 must be"),
    ],
)
def test_refusals(argument, message):
    (found,) = problems(argument)
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("command", "argument", "message"),
    [
        (plan, "plan.sweep=[2147483648]", "plan.sweep=2147483648 must be at least 2 and at most"),
        (bench, "bench.lengths=[2147483648]", "bench.lengths=2147483648 must be at least 2 and"),
        (bench, "bench.threads=5000", "bench.threads=5000 must be at least 1 and at most 4096"),
        (prepare, "prepare.shard_mib=1099511627776", "prepare.shard_mib=1099511627776 must be at"),
        (prepare, "prepare.shard=1/5000", "prepare.shard=1/5000 must be i/N"),
        (prepare, "prepare.shard=1/" + "9" * 240, "prepare.shard=1/9999"),
        (prepare, "prepare.workers=1000000", "prepare.workers=1000000 must be at least 1 and at"),
        (report, "report.compare=['']", "report.compare[0] is empty"),
    ],
)
def test_what_commands_refuse(command, argument, message):
    with pytest.raises(UserError) as caught:
        command.read([argument])
    (found,) = caught.value.problems
    assert found.startswith(message)


def test_description_holds_every_setting_and_composes_again():
    config = compose(["train.steps=7", "run.name=x"])
    text = describe(config)
    assert "steps: 7" in text
    assert all(key.rpartition(".")[2] + ":" in text for key in RUNS)


def test_nothing_is_left_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose([])
    assert list(tmp_path.iterdir()) == []


def test_configuration_is_frozen():
    config = compose([])
    assert isinstance(config, Config)
    with pytest.raises(AttributeError):
        config.train.steps = 1


MISTAKES = [
    None,
    "",
    [[]],
    {"a": {"b": [1]}},
    b"x",
    float("nan"),
    float("inf"),
    10**400,
    -(2**63) - 1,
    "9" * 5000,
    "a\0b",
    "\ud800",
]


def every_setting():
    """The settings of a run, and those of each command's own group."""
    yield from ((Config, key) for key in RUNS)
    for schema in (bench.BenchConfig, plan.PlanConfig, prepare.PrepareConfig, report.ReportConfig):
        yield from ((schema, key) for key in Settings(schema) if key not in RUNS)


RULES = {
    bench.BenchConfig: bench._problems,
    plan.PlanConfig: plan._problems,
    prepare.PrepareConfig: prepare._problems,
}


@pytest.mark.parametrize(("schema", "key"), list(every_setting()))
def test_every_setting_takes_or_refuses_every_kind_of_value(schema, key):
    """By name, on one short line; what is taken is what was given."""
    for value in MISTAKES:
        found = []
        config = Settings(schema).build([(key, value)], found)
        found = found or [*validate(config), *RULES.get(schema, lambda _: ())(config)]
        assert all(line.isprintable() and len(line) < 300 for line in found)
        if found:
            assert found[0].startswith(key)
        else:
            for name in key.split("."):
                config = getattr(config, name)
            assert str(config) == str(value)


@pytest.mark.parametrize("typed", ["1e9", "1_000_000_000", "1000000000", "1.0e9"])
def test_a_budget_in_tokens(typed):
    assert compose([f"train.tokens={typed}"]).train.tokens == 10**9


def test_a_budget_is_given_once():
    """Steps of a file give way to tokens; those of the command line contradict them."""
    assert compose(["+experiment=tiny", "train.tokens=5"]).train.tokens == 5
    assert compose(["train.steps=3", "train.tokens=null"]).train.steps == 3
    for arguments in (["train.steps=3", "train.tokens=5"], ["train={steps: 3, tokens: 5}"]):
        assert problems(*arguments) == [
            "train.steps=3 and train.tokens=5 both say how long the run is: leave one out, or set "
            "train.tokens=null"
        ]
    assert problems("train.tokens=1.5") == ["train.tokens=1.5 is not a whole number"]


def test_a_budget_of_a_file_is_not_overruled_silently(write, copied_configs):
    (copied_configs / "experiment" / "other.yaml").write_text(f"{HEADER}train: {{tokens: 2e9}}")
    assert compose(["+experiment=other"]).train.tokens == 2 * 10**9
    assert compose(["+experiment=other", "train.tokens=5"]).train.tokens == 5
    (problem,) = problems("+experiment=other", "train.steps=3")
    assert problem.startswith("train.steps=3 and train.tokens=2000000000.0 both say")


def test_a_runs_settings_that_no_run_has_written():
    damaged = {"run": {"name": datetime.date(2020, 1, 1), "dir": "${"}, "model": 3, "train": None}
    with pytest.raises(UserError) as caught:
        recompose({**damaged, "gone": {1: 2}}, ["train.steps=x"])
    assert [line.partition("=")[0] for line in caught.value.problems] == [
        "run.name",
        "run.dir",
        "train.steps",
    ]


def test_texts_stay_as_they_are_typed():
    for key in filter(RUNS.is_text, RUNS):
        found = []
        RUNS.build([(key, "x")], found)
        assert not found
    for typed in ("007", "1e3", "1_000", "1.10", "True"):
        assert compose([f"run.name={typed}"]).run.dir == f"runs/{typed}"


def test_what_a_command_does_not_read_is_said(caplog):
    arguments = ["+experiment=tiny", "run.name=x", "train.steps=3", "train={seed: 1}", "data=code"]
    warn_of_unused(arguments, ("run.", "train.seed"))
    assert caplog.messages == [
        "train.steps=3 does nothing in this command",
        "data=code does nothing in this command",
    ]


@pytest.fixture(scope="module")
def copied_configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copied") / "configs"
    shutil.copytree(CONFIGS, folder)
    return folder


@pytest.fixture
def write(copied_configs, monkeypatch):
    """Writes an experiment, mine.yaml, among the others; returns the problems of composing it."""
    folder = copied_configs
    monkeypatch.setattr(mst_train.cli.config_folders, "_own_folder", lambda: folder)

    def problems_of(text, name="mine"):
        path = folder / "experiment" / f"{name}.yaml"
        path.write_bytes(text if isinstance(text, bytes) else f"{HEADER}{text}\n".encode())
        return problems("+experiment=mine")

    return problems_of


HEADER = "# @package _global_\n"


@pytest.mark.parametrize("header", ["\n\n# @package _global_\n", "#@package _global_\r\n"])
def test_first_lines_that_hydra_reads(copied_configs, write, header):
    (copied_configs / "experiment" / "other.yaml").write_text(f"{header}train: {{steps: 3}}\n")
    assert compose(["+experiment=other"]).train.steps == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n\tsteps: 3", "line 3, is not YAML: found character '\\t'"),
        ("train: [", "line 3, is not YAML: expected the node content"),
        ("run: {name: 'x}", "is not YAML: found unexpected end of stream"),
        ("train: *x", "line 2, is not YAML: found undefined alias 'x'"),
        ("train: {steps: 3}\n---\ntrain: {}", "is not YAML: but found another document"),
        ('run: {name: "a\x01b"}', "is not YAML: unacceptable character #x0001"),
        (b"# @package _global_\nrun: {name: \xe9}", "is not UTF-8"),
        (b"train: {steps: 3}", "line 1, is not '# @package _global_'"),
        ("- a", "holds no settings"),
        ("3", "holds no settings"),
        ("train: {steps: 3, steps: 4}", "line 2: steps is there twice"),
        ("train: {null: 3}", "line 2: null is not a name"),
        ("? [a]\n: 1", "line 2: this is not a name"),
        ("train.steps: 3", "line 2: write train.steps as train: {steps: VALUE}"),
        ("train: &a\n  steps: *a", "an alias stands inside of what it is the name of"),
        ("run: {name: !!python/object/apply:os.getcwd []}", "python/object/apply:os.getcwd is no"),
        ("run: {name: '${'}", "line 2: no viable alternative at input '${'"),
        ("run: {name: 007}", "line 2: YAML takes 007 for another number"),
        ("train: {steps: 0x" + "f" * 5000 + "}", "line 2: a number has more than 300 digits"),
        ("train: {steps: " + "[" * 3000, "has more than 20 levels"),
        ("train: {steps: " + "[" * 30 + "]" * 30 + "}", "line 2: more than 20 levels"),
        ("hydra: {mode: MULTIRUN}", "line 2: hydra's own settings do nothing here"),
        ("defaults:\n  - mine", "includes itself, by way of experiment/mine"),
        ("defaults:\n  - nope", "Could not load 'experiment/nope'"),
        ("defaults: tiny", "defaults must be a list (got str)"),
        ("train: null", "train is a group of settings: set one of train.steps"),
        ("trian: {steps: 3}", "trian.steps is not a setting: did you mean train.steps?"),
        ("run: {name: '${run.name}'}", "run.name=${run.name}: Recursive interpolation detected"),
    ],
)
def test_broken_experiments(write, text, message):
    (found,) = write(text)
    assert message in found
    assert "\n" not in found


def test_experiments_that_include_each_other_and_a_bomb_of_aliases(write):
    write("defaults:\n  - mine", "other")
    (found,) = write("defaults:\n  - other")
    assert "includes itself, by way of experiment/mine and experiment/other" in found
    names = "abcdefgh"
    lines = [f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise(names)]
    (found,) = write("\n".join(["a: &a [x]", *lines]))
    assert "more than 10000 values" in found


def test_other_commands_settings_are_left_out_with_a_warning(caplog):
    config = compose(["+bench=step", "plan.gpus=2", "bench.nothing=3", "plan={gpus: 2}"])
    assert not hasattr(config, "bench") and not hasattr(config, "plan")
    assert [record.message for record in caplog.records] == [
        "plan.gpus=2 does nothing in this command: it is python -m mst_train.plan's",
        "bench.nothing=3 does nothing in this command: it is python -m mst_train.bench's",
        "plan={gpus: 2} does nothing in this command: it is python -m mst_train.plan's",
    ]
    assert plan.read(["+experiment=paper_base", "plan.gpus=2"]).plan.gpus == 2
    with pytest.raises(UserError, match=r"plan\.gpus=3 is not a multiple"):
        plan.read(["plan.gpus=3", "parallel.sequence_parallel=2"])
    with pytest.raises(UserError, match=r"plan\.gpsu is not a setting: did you mean plan\.gpus"):
        plan.read(["plan.gpsu=3"])


@pytest.mark.parametrize(("value", "count"), [("true", "all"), ("false", 0)])
def test_a_setting_by_its_old_name(value, count, caplog):
    _warn_once.cache_clear()
    assert compose([f"memory.keep_attention={value}"]).memory.keep.attention == count
    new = f"memory.keep.attention={count}"
    told = f"memory.keep_attention is memory.keep.attention now: taking {new}"
    assert [record.getMessage() for record in caplog.records] == [told]


def test_settings_that_moved_as_they_are(caplog):
    _warn_once.cache_clear()
    arguments = ["evaluation.passkey_every=5", "evaluation.passkey_lengths=[64,128]"]
    config = compose([*arguments, "evaluation.passkey_depths=[0.5]"])
    evaluation = config.evaluation
    assert (evaluation.every, evaluation.lengths, evaluation.depths) == (5, [64, 128], [0.5])
    told = "evaluation.passkey_lengths is evaluation.lengths now: taking evaluation.lengths="
    assert f"{told}[64,128]" in [record.getMessage() for record in caplog.records]
    with pytest.raises(UserError, match=r"evaluation\.lengths\[0\]=long is not a whole number"):
        compose(["evaluation.passkey_lengths=[long]"])
    before = {"evaluation": {"passkey_lengths": [64]}}  # as a checkpoint of then has them
    assert recompose(before, []).evaluation.lengths == [64]
    assert recompose(before, ["evaluation.lengths=[32]"]).evaluation.lengths == [32]
    assert recompose({"evaluation": {"lengths": [64]}}, arguments).evaluation.lengths == [64, 128]


def test_what_cannot_be_of_an_old_name():
    with pytest.raises(UserError, match="keep_attention=often is neither true nor false"):
        compose(["memory.keep_attention=often"])


def test_experts_projections_are_not_kept():
    with pytest.raises(UserError, match=r"memory.keep.mlp=2 keeps .* model.num_experts=4 experts"):
        compose(["model.num_experts=4", "memory.keep.mlp=2"])


@pytest.mark.parametrize("blocks", ["most", "-1"])
def test_how_many_blocks_keep(blocks):
    with pytest.raises(UserError, match=rf"memory\.keep\.mlp={blocks} must be"):
        compose([f"memory.keep.mlp={blocks}"])
