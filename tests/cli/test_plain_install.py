"""A plain install, with torch and numpy: the method works, and a command says what it lacks."""

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from mst_train.cli.command import FRAMEWORK

PLAIN = """
import importlib
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {framework}:
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

import torch
import mst_train.attention, mst_train.memory.tracker, mst_train.model, mst_train.optim
from mst_train.mst import mini_sequence_mlp

x, up, gate, down = (torch.ones(4, 4) for _ in range(4))
assert mini_sequence_mlp(x, gate, up, down).shape == (4, 4)

for command in {commands}:
    assert importlib.import_module(command).main([]) == 2
"""


def test_the_method_needs_torch_alone_and_commands_say_what_they_lack():
    names = ("", ".bench", ".evaluate", ".plan", ".prepare", ".report")
    commands = [f"mst_train{name}.__main__" for name in names]
    lacking = {*FRAMEWORK, "triton", "transformers", "deepspeed"}
    program = PLAIN.format(framework=lacking, commands=commands)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    message = "error: hydra is not installed: pip install 'mst-train[train]'\n"
    assert (done.returncode, done.stderr) == (0, len(commands) * message)


def test_what_a_plain_install_lacks_is_the_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = [line.partition(">")[0] for line in project["optional-dependencies"]["train"]]
    homes = packages_distributions()
    assert sorted(homes[package][0].lower().replace("_", "-") for package in FRAMEWORK) == sorted(
        names
    )
