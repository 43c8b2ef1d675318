"""A plain install, with torch and numpy: the method works, and a command says what it lacks."""

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from mst_train.cli.command import FRAMEWORK

PLAIN = """
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

from mst_train.__main__ import main

sys.exit(main(["train.steps=1"]))
"""


def test_the_method_needs_torch_alone_and_a_command_says_what_it_lacks():
    program = PLAIN.format(framework={*FRAMEWORK, "triton", "transformers", "deepspeed"})
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: hydra is not installed: pip install 'mst-train[train]'\n"


def test_what_a_plain_install_lacks_is_the_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = [line.partition(">")[0] for line in project["optional-dependencies"]["train"]]
    homes = packages_distributions()
    assert sorted(homes[package][0].lower().replace("_", "-") for package in FRAMEWORK) == sorted(
        names
    )
