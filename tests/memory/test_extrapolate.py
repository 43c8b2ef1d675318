"""A few blocks stand for many: random settings, against steps of the depth that they have."""

import random
from dataclasses import asdict, replace

import pytest
from steps import describe, marked, random_step, with_random_pieces

import mst_train.memory.extrapolate as extrapolate
from mst_train.memory.devices import find_device
from mst_train.memory.simulate import simulate
from mst_train.memory.simulated_step import ALLOCATION_BYTES

DEVICES = (find_device("cpu"), find_device("a100_80gb"))


def deep_step(seed):
    """A random step of enough blocks to be extrapolated, its device and how many share it."""
    step, draw = random_step(seed), random.Random(-seed)
    config = step.config
    device = DEVICES[config.kernel.attention != "cpu" and draw.random() < 0.5]
    period = extrapolate.layer_period(config.model)
    layers = period * draw.randint(-(-7 // period), -(-9 // period))
    config = extrapolate.with_layers(config, layers)
    if len(extrapolate._runs(config)) > 1:  # each of them may be long
        config = with_random_pieces(seed, extrapolate.with_layers(config, 3 * layers))
    gpus = draw.choice([1, 1, 4])
    if gpus > 1 and not config.optimizer.in_backward and config.precision != "bf16":
        zero = replace(config.parallel, zero_stage=draw.randint(0, 3))
        adamw = replace(config.optimizer, name="adamw")
        config = replace(config, parallel=zero, optimizer=adamw)
    return replace(step, config=config), device, gpus


def found(step, device, gpus):
    with step.portions.used():
        found = simulate(step.config, device, gpus=gpus, cu_seqlens=step.cu_seqlens)
    return found.allocated_bytes, found.host_bytes, found.breakdown, asdict(found.work)


def at_full_depth(monkeypatch, *arguments):
    with monkeypatch.context() as patch:
        patch.setattr(extrapolate, "_SHALLOW", 10**6)
        return found(*arguments)


@pytest.mark.parametrize("seed", marked(range(60), quick=8, slow=28))
def test_a_few_blocks_stand_for_all(monkeypatch, seed):
    """To the byte; on a GPU but for what is rounded up once for all blocks of many, and under ZeRO
    for what rounding each process's part up adds to a block's."""
    step, device, gpus = deep_step(seed)
    few, all_of_them = found(step, device, gpus), at_full_depth(monkeypatch, step, device, gpus)
    rounding = 0
    if step.config.parallel.zero_stage > 0:
        rounding = 1024 * step.config.model.num_layers
    elif device.kind == "cuda" and step.config.model.num_layers > 9:
        rounding = 2 * ALLOCATION_BYTES
    if rounding == 0:
        assert few == all_of_them, describe(step)
    for one, other in zip(few[:2], all_of_them[:2], strict=True):
        assert abs(one - other) <= rounding, describe(step)
    assert few[3] == pytest.approx(all_of_them[3], rel=1e-3), describe(step)


@pytest.mark.parametrize(
    ("seed", "name", "mistake"),
    [
        (2, "layer_period", lambda _: 1),
        (75, "layer_period", lambda _: 1),
        (104, "layer_period", lambda _: 1),
        (13, "AHEAD", 0),
    ],
    ids=["period, plain", "period, offloaded", "period, some keep more", "ahead"],
)
def test_a_mistake_would_be_seen(monkeypatch, seed, name, mistake):
    """Blocks of two kinds taken for alike, and what comes back from the host ahead forgotten."""
    step = deep_step(seed)
    expected = at_full_depth(monkeypatch, *step)
    monkeypatch.setattr(extrapolate, name, mistake)
    assert found(*step) != expected
