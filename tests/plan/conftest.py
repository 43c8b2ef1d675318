"""Many predictions of the same steps: each step is simulated once for all tests."""

from dataclasses import fields, replace

import pytest

import mst_train.memory.extrapolate as extrapolate
import mst_train.memory.fakes as stand_ins
from mst_train.config import Config, RunConfig
from mst_train.memory.simulated_step import SimulatedStep


@pytest.fixture(scope="session")
def known():
    """What each step took."""
    return {}


@pytest.fixture(autouse=True)
def simulated_once(known, monkeypatch):
    """What a step takes depends on neither its run's name nor what it is held against."""
    run = SimulatedStep.run

    def once(step, config):
        device = replace(step.device, memory_bytes=0)
        memory = replace(config.memory, device_budget_gib=None, host_budget_gib=None)
        settings = {field.name: getattr(config, field.name) for field in fields(Config)}
        plain = Config(**settings | {"run": RunConfig(), "memory": memory})
        blocks = extrapolate.KEYS_AT_ONCE, stand_ins.KEYS_AT_ONCE
        key = repr((replace(step, device=device), plain, blocks))
        if key not in known:
            known[key] = run(step, config)
        return known[key]

    monkeypatch.setattr(SimulatedStep, "run", once)
