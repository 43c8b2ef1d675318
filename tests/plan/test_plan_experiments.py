"""Every experiment that is shipped composes, is valid and can be planned."""

from pathlib import Path

import pytest

from mst_train.plan.choose import choose
from mst_train.plan.config import configured_target, read
from mst_train.plan.predict import predict

FOLDER = Path(__file__).parent.parent.parent / "configs" / "experiment"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
BEYOND_80_GB = {  # at the paper's lengths, by what today's transformers takes in it
    "llama3_8b_vanilla_seq5k",
    "llama3_8b_lengths_vanilla",
    "llama3_8b_lengths_recompute",
}


def arguments(name):
    """Of a command for an experiment, with what it leaves to the user."""
    open_ones = {"continue_pretraining": ["model.from_pretrained=null"]}
    return [f"+experiment={name}", *open_ones.get(name, [])]


@pytest.mark.parametrize("name", NAMES)
def test_experiment_is_valid(name):
    config = read(arguments(name))
    assert config.run.name == name
    assert configured_target(config).budget_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("ablation")])
def test_experiment_can_be_planned(name):
    config = read(arguments(name))
    if config.memory.policy == "auto":
        config = read([*arguments(name), "plan.device=a100_80gb"])
        assert choose(config, configured_target(config)).chosen.fits
        return
    target = configured_target(config)
    prediction = predict(config, target)
    assert prediction.simulation.peak_bytes > 0
    if target.device.name == "a100_80gb" and config.memory.policy == "mst":
        assert prediction.fits


def test_the_papers_lengths_are_there():
    lengths = {
        "llama3_8b": 60,
        "llama2_7b": 84,
        "mistral_7b": 70,
        "qwen2_7b": 74,
        "gemma2_9b": 36,
    }
    for model, thousands in lengths.items():
        config = read([f"+experiment={model}_seq{thousands}k"])
        assert config.data.sequence_length == 1024 * thousands
        assert config.optimizer.in_backward
        assert config.precision == "bf16"
        for policy in ("vanilla", "recompute"):
            assert list(FOLDER.glob(f"{model}_{policy}_seq*k.yaml"))
