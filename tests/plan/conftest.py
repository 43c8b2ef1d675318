"""Many predictions of the same steps: each step is simulated once for all tests."""

from dataclasses import fields, replace

import pytest

import mst_train.memory.fakes as stand_ins
import mst_train.memory.simulate as simulate_module
from mst_train.config import Config, RunConfig


@pytest.fixture(scope="session")
def known():
    """What each step took."""
    return {}


@pytest.fixture(autouse=True)
def simulated_once(known, monkeypatch):
    """What a step takes depends on neither its run's name nor what it is held against."""
    run = simulate_module._run

    def once(*arguments):
        policy, dtype, device, *rest, config = arguments
        device = replace(device, memory_bytes=0)
        memory = replace(config.memory, device_budget_gib=None, host_budget_gib=None)
        settings = {field.name: getattr(config, field.name) for field in fields(Config)}
        config = Config(**settings | {"run": RunConfig(), "memory": memory})
        blocks = simulate_module.KEYS_AT_ONCE, stand_ins.KEYS_AT_ONCE
        key = repr((policy, dtype, device, rest, config, blocks))
        if key not in known:
            known[key] = run(*arguments)
        return known[key]

    monkeypatch.setattr(simulate_module, "_run", once)
