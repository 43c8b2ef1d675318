"""DeepSpeed has what the adapter reads of its insides."""

import importlib
import importlib.metadata
import inspect
import re
import tomllib
from pathlib import Path

import pytest

from mst_train.deepspeed_adapter import INSIDES

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.mark.parametrize("name", INSIDES)
def test_what_is_read_of_its_optimizers_is_there(name):
    deepspeed = pytest.importorskip("deepspeed")
    module, _, kind = f"deepspeed.runtime.{name}".rpartition(".")
    source = inspect.getsource(getattr(importlib.import_module(module), kind))
    missing = [
        used
        for used in INSIDES[name]
        if not re.search(rf"self\.{used}(: .*)? = |def {used}\(|\n    {used} = ", source)
    ]
    assert not missing, (
        f"DeepSpeed {deepspeed.__version__} has changed: {name} has no {', '.join(missing)}, which "
        f"mst_train/deepspeed_adapter.py reads"
    )


def test_the_minor_that_was_tested_is_the_one_asked_for():
    pytest.importorskip("deepspeed")
    minor = ".".join(importlib.metadata.version("deepspeed").split(".")[:2])
    (wanted,) = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"][
        "distributed"
    ]
    assert wanted.startswith(f"deepspeed>={minor},<")
