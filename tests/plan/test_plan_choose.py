"""memory.policy=auto: the fastest settings that fit."""

import pytest

from mst_train.config import PRECISIONS, validate
from mst_train.errors import UserError
from mst_train.memory.tracker import MemoryTracker
from mst_train.plan.candidates import levers, settings
from mst_train.plan.choose import choose, describe
from mst_train.plan.config import configured_target, read
from mst_train.plan.predict import predict
from mst_train.plan.show import render
from mst_train.run.train import train

AUTO = ["model=llama_bench", "plan.device=cpu", "memory.policy=auto"]
IN_BACKWARD = ["optimizer.max_grad_norm=null"]
LEAN = "mst, attention computed again"
"""How the settings are described to which more is added where it fits."""


def choice(*arguments):
    config = read([*AUTO, *arguments])
    return choose(config, configured_target(config))


def test_the_fastest_that_fits():
    found = choice("data.sequence_length=1024")
    shown = render([found.chosen], ["", "what was compared, " * 10 + "chosen"], 100)
    assert shown.endswith("compared, chosen")
    fitting = [p for p in found.compared if p.fits]
    assert found.chosen.seconds == min(p.seconds for p in fitting)
    assert found.chosen.config.memory.policy in ("vanilla", "mst")


@pytest.mark.slow
def test_a_budget_that_only_the_method_meets():
    roomy = choice("data.sequence_length=4096")
    peaks = {describe(p): p.simulation.peak_bytes for p in roomy.compared}
    between = (peaks["vanilla"] + peaks[LEAN]) / 2 / 2**30
    found = choice("data.sequence_length=4096", f"memory.device_budget_gib={between}")
    assert found.chosen.config.memory.policy == "mst"
    assert found.chosen.fits
    title, *lines = found.reason.splitlines()
    assert title == "memory.policy=auto:" and lines[0].startswith("  mst")
    assert lines[0].endswith("chosen")
    large = [line.split()[0].strip(",") for line in lines if line.endswith("too large")]
    assert large[0] == "vanilla" and set(large[1:]) <= {"mst"}
    assert len(lines) == len(found.compared)


@pytest.mark.slow
def test_nothing_fits_names_what_would():
    small = ("model=llama_tiny", "model.num_layers=1", "memory.device_budget_gib=0.08")
    with pytest.raises(UserError) as caught:
        choice(*small, "data.sequence_length=4096")
    message = str(caught.value)
    assert "data.sequence_length=4096" in message
    assert "The nearest that fits: data.sequence_length=" in message
    length = int(message.partition("nearest that fits: data.sequence_length=")[2].split()[0])
    assert length % 1024 == 0
    assert 1024 <= length < 4096
    choice(*small, f"data.sequence_length={length}")


@pytest.mark.slow
def test_what_auto_may_not_change_is_named_where_it_helps():
    """States of 30 GiB on a device of 24: no length fits, nor any memory setting."""
    arguments = ["+experiment=llama3_8b_auto", "plan.device=24", "data.sequence_length=4096"]
    config = read(arguments)
    seen = []
    with pytest.raises(UserError) as caught:
        choose(config, configured_target(config), seen.append)
    message = str(caught.value)
    assert "No shorter sequence fits either. It fits with precision=bf16_master " in message
    words = message.partition("It fits with ")[2].partition(":")[0].split()
    other = read([*arguments, *words])
    found = choose(other, configured_target(other))
    assert found.chosen.fits
    assert any(describe(p) in message for p in found.compared if p.fits)
    assert len(seen) <= 5  # none at full length of settings that cannot hold the states


def test_levers_are_configurations_that_can_be():
    config = read([*AUTO, "train.micro_batch_size=2", "data.sequence_length=64"])
    found = dict(levers(config))
    assert list(found) == [
        "train.micro_batch_size=1 train.accumulation_steps=2",
        "optimizer.max_grad_norm=null",
        "precision=bf16_master",
        "precision=bf16",
    ]
    for words, other in found.items():
        assert not validate(other)
        assert other == read(
            [*AUTO, "train.micro_batch_size=2", "data.sequence_length=64", *words.split()]
        )
    bf16 = read([*AUTO, "precision=bf16", "optimizer=in_backward"])
    assert [words for words, _ in levers(bf16)] == [
        "precision=bf16_master optimizer.offload=host optimizer.in_backward=false"
    ]
    assert list(levers(bf16, gpus=2)) == []  # several optimizers go to their hosts with ZeRO alone
    sharing = read([*AUTO, "precision=fp32", "parallel.zero_stage=1"])
    assert [words for words, _ in levers(sharing, gpus=2)] == ["precision=bf16_master"]
    many = [*AUTO, "precision=bf16", "optimizer=in_backward", "train.micro_batch_size=2"]
    words, other = next(levers(read(many)))
    assert other == read([*many, *words.split()])
    on_host = read([*AUTO, "precision=bf16_master", "optimizer.offload=host"])
    assert [words for words, _ in levers(on_host)] == []


@pytest.mark.parametrize("host", ["1e-9", "null"])
def test_offload_that_cannot_be_does_not_hide_what_fits(host):
    found = choice("data.sequence_length=2048", f"memory.host_budget_gib={host}")
    assert found.chosen.fits


def test_updates_in_the_backward_only_where_they_are_allowed():
    def among(*arguments):
        return [c for group in settings(read([*AUTO, *arguments])) for c in group]

    assert not any(c.optimizer.in_backward for c in among())  # clipping
    assert any(c.optimizer.in_backward for c in among(*IN_BACKWARD))
    accumulating = among(*IN_BACKWARD, "train.accumulation_steps=2")
    assert not any(c.optimizer.in_backward for c in accumulating)
    asked = among("memory.keep.attention=0")
    assert {c.memory.keep.attention for c in asked if c.memory.policy == "mst"} == {0}
    assert all(c.memory.offload == "host" for c in among("memory.offload=host"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_offered_with_muon_can_be_trained(precision):
    config = read([*AUTO, *IN_BACKWARD, "optimizer.name=muon", f"precision={precision}"])
    offered = [c for group in settings(config) for c in group]
    offered += [c for _, c in levers(config)]
    assert any(c.optimizer.in_backward for c in offered)
    assert not any(problem for c in offered for problem in validate(c))


def on_80_gb(*arguments):
    config = read(["+experiment=llama3_8b_auto", "plan.device=a100_80gb", *arguments])
    return choose(config, configured_target(config)).chosen


@pytest.mark.slow
def test_offload_is_chosen_where_it_saves_time():
    """Llama3-8B: at 60K attention's results fit in most blocks, and offloading them all is not 5%
    faster; at 100K they do not, and copies cost less than computing attention again."""
    layers = 32
    for host in (256, 1):
        chosen = on_80_gb(f"memory.host_budget_gib={host}").config
        assert chosen.memory.offload == "none"
        assert layers / 2 < chosen.memory.keep.attention < layers
        assert chosen.optimizer.in_backward
    long = on_80_gb("data.sequence_length=102400", "memory.host_budget_gib=256").config
    assert (long.memory.offload, long.memory.keep.attention) == ("host", "all")


@pytest.mark.slow
def test_training_stays_inside_the_budget(tmp_path, corpus, cache):
    """A run with a budget that only the method meets, measured by the tracker."""
    arguments = ["model=llama_tiny", "memory.policy=auto", "train.steps=2", "train.eval_every=0"]
    arguments += ["data.sequence_length=2048", "plan.device=cpu", f"run.dir={tmp_path}/run"]
    arguments += ["data.tokenizer_vocab_size=512", "data.validation_fraction=0.2"]
    arguments += [f"data.source={corpus}", f"data.cache_dir={cache}", "model.num_layers=2"]
    config = read(arguments)
    target = configured_target(config)
    peaks = {describe(p): p.simulation.peak_bytes for p in choose(config, target).compared}
    budget = (peaks["vanilla"] + peaks[LEAN]) / 2
    config = read([*arguments, f"memory.device_budget_gib={budget / 2**30}"])
    predicted = predict(
        choose(config, configured_target(config)).chosen.config, configured_target(config)
    )
    with MemoryTracker() as tracker:
        train(config)
    assert tracker.peak_bytes <= budget
    assert tracker.peak_bytes == pytest.approx(predicted.simulation.allocated_bytes, rel=0.05)
