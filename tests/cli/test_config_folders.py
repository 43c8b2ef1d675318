"""Configuration files of one's own, beside the project's."""

import pytest

from mst_train.__main__ import main
from mst_train.cli.compose import compose
from mst_train.cli.config_folders import VARIABLE, choices
from mst_train.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "it's mine, yes"
    for name, text in {
        "model/small.yaml": "num_layers: 1\nhidden_size: 32\n",
        "experiment/mine.yaml": (
            "# @package _global_\ndefaults:\n  - tiny\n  - override /model: small\n  - _self_\n"
            "train: {steps: 7}\n"
        ),
    }.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


def test_presets_and_experiments_from_any_folder(folder):
    assert compose(["model=small"]).model.num_layers == 1
    config = compose(["+experiment=mine"])
    assert (config.run.name, config.train.steps, config.model.hidden_size) == ("mine", 7, 32)
    assert config.optimizer.learning_rate == 3e-3  # tiny's
    assert {"small", "llama3_8b"} <= set(choices("model"))
    assert compose(["model=llama3_8b"]).model.num_layers == 32


@pytest.mark.parametrize("option", [["--config-dir", "{}"], ["--config-dir={}"]])
def test_the_option_names_the_folder(folder, option, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "/nowhere")
    arguments = [word.format(folder) for word in option]
    assert main([*arguments, "+experiment=mine", "--config"]) == 0
    assert "steps: 7" in capsys.readouterr().out
    assert main([*arguments, "--help"]) == 0
    assert " small" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-dir"], "error: --config-dir names no folder"),
        (["--config-dir", "nowhere"], "--config-dir nowhere (or MST_CONFIG_DIR) is not a folder"),
        (["+experiment=broken"], "broken.yaml, line 1, is not YAML"),
        (["model=smal"], "did you mean small?"),
    ],
)
def test_mistakes_are_told(folder, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "experiment" / "broken.yaml").write_text("{a: 1")
    assert main(["--config", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_the_projects_is_not_replaced(folder):
    (folder / "model" / "llama3_8b.yaml").write_text("num_layers: 1\n")
    with pytest.raises(UserError, match=r"llama3_8b\.yaml has the name of a file in"):
        compose([])
