"""torch's profile of some steps of a run."""

import gzip
import json

import pytest

from mst_train.config import validate
from mst_train.run.train import train


def test_the_steps_asked_for_are_profiled(small_config, change, tmp_path, caplog):
    plain = train(change(small_config, **{"run.dir": str(tmp_path / "plain")}))
    with caplog.at_level("INFO"):
        summary = train(change(small_config, **{"train.profile": [2, 3]}))
    assert summary["loss"] == plain["loss"]
    file = tmp_path / "run" / "profile_2_3_rank0.json.gz"
    assert f"the profile: {file}" in caplog.messages
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    steps = [event for event in events if event.get("name") == "aten::embedding"]
    assert len(steps) == 2  # forwards
    assert sorted(tmp_path.glob("run/profile*")) == [file]


@pytest.mark.parametrize("steps", [[5, 9], [7, 9]])
def test_a_run_that_ends_before_leaves_none(small_config, change, tmp_path, steps):
    train(change(small_config, **{"train.profile": steps}))
    assert not list(tmp_path.glob("run/profile*"))


@pytest.mark.parametrize("steps", [[1], [0, 2], [3, 2], [1, 2, 3]])
def test_it_is_two_steps(small_config, change, steps):
    (problem,) = validate(change(small_config, **{"train.profile": steps}))
    assert "has to be [FROM,TO]" in problem
