"""A run that begins with another one's settings."""

from dataclasses import asdict

import pytest
import yaml

from mst_train.cli.compose import compose
from mst_train.errors import UserError
from mst_train.plan import config as plan


@pytest.fixture
def run(tmp_path):
    """A folder as a run leaves it, of one whose settings are no preset's; and those settings."""
    config = compose(["model=qwen2_7b", "train.tokens=1e6", "train.seed=7", "run.name=first"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    return tmp_path, config


@pytest.mark.parametrize("named", ["{}", "{}/config.yaml"])
def test_it_has_all_settings_but_those_given(run, named):
    folder, before = run
    path = named.format(folder)
    after = compose([f"+experiment={path}", "run.name=second", "optimizer.learning_rate=5e-4"])
    assert (after.run.name, after.run.dir, after.run.resume) == ("second", "runs/second", "auto")
    expected = asdict(before)
    expected["optimizer"]["learning_rate"] = 5e-4
    expected["run"] = asdict(after)["run"]
    assert asdict(after) == expected
    planned = plan.read(["plan.gpus=2", f"experiment={path}", "run.name=second"])
    assert (planned.plan.gpus, planned.train.seed) == (2, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+experiment={}"], "another run now: give run.name=NAME"),
        (["+experiment={}", "run.name=x", "model=llama3_8b"], "cannot use model=llama3_8b"),
        (["+experiment={}", "run.name=x", "train.steps=3"], "both say how long the run is"),
        (["+experiment={}", "run.name=x", "train.stepz=3"], "did you mean train.steps?"),
        (["+experiment={}/gone", "run.name=x"], "that is there"),
        (["+experiment={}", "+experiment={}/config.yaml", "run.name=x"], "give one experiment"),
        (["+experiment={}/broken.yaml", "run.name=x"], "broken.yaml, line 1, is not YAML"),
        (["+experiment={}/list.yaml", "run.name=x"], "list.yaml holds no settings"),
        (["+experiment={}/old.yaml", "run.name=x"], "old.yaml has defaults: put it into"),
    ],
)
def test_mistakes_are_told(run, arguments, message):
    folder, _ = run
    (folder / "broken.yaml").write_text("{a: 1")
    (folder / "list.yaml").write_text("- a")
    (folder / "old.yaml").write_text("defaults:\n  - tiny\n")
    with pytest.raises(UserError) as caught:
        compose([argument.format(folder) for argument in arguments])
    assert message in str(caught.value)


def test_an_empty_file_has_the_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    config = compose([f"+experiment={tmp_path}/empty.yaml", "run.name=x"])
    assert config.train.steps == 1000


@pytest.mark.parametrize("named", ["{}", "{}/checkpoints/step_00000010"])
@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ("data: {sequence_length: 640}", 640),
        ("{data: {sequence_length: 640}, model: {rope_scaling: {original_length: 64}}}", 64),
    ],
)
def test_a_run_tells_the_length_that_positions_are_stretched_from(
    tmp_path, named, settings, length
):
    (tmp_path / "config.yaml").write_text(settings)
    origin = f"run.init_from={named.format(tmp_path)}"
    stretched = ["model.rope_scaling.type=yarn", "model.rope_scaling.factor=4"]
    with pytest.raises(UserError, match=r"needs model\.rope_scaling\.original_length") as caught:
        compose([origin, *stretched])
    given = f"model.rope_scaling.original_length={length}"
    assert caught.value.problems[1] == f"{origin} was trained on {given}"
    compose([origin, *stretched, given])
    (tmp_path / "config.yaml").write_text("data: [")
    with pytest.raises(UserError) as caught:
        compose([origin, *stretched])
    assert len(caught.value.problems) == 1
