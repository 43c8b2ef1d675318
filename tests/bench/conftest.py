"""A bench small enough for a test."""

import gc
import json

import pytest

from mst_train.bench.__main__ import main

TINY = (
    "model.vocab_size=128",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "bench.threads=1",
    "bench.lengths=[48]",
    "bench.repetitions=1",
)


@pytest.fixture(autouse=True)
def what_is_imported_is_no_garbage():
    """A bench collects garbage before each run: through all that other tests have imported."""
    gc.freeze()


@pytest.fixture
def run_bench(tmp_path, capsys):
    """run_bench("step", "key=value", ...): the report and its folder."""

    def run(name, *settings, status=0):
        folder = tmp_path / name
        arguments = [f"+bench={name}", *TINY, f"bench.dir={folder}", *settings]
        capsys.readouterr()  # what importing a package may have printed
        result = main([*arguments, "bench.output=json"])
        printed = capsys.readouterr()
        assert result == status, printed.err
        return json.loads(printed.out), folder

    return run


@pytest.fixture
def by_variant():
    """by_variant(report, work="step"): the report's rows by their variant."""

    def rows(report, work="step"):
        return {row["variant"]: row for row in report["rows"] if row["work"] == work}

    return rows
