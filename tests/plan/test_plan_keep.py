"""What memory.policy=auto keeps where memory is left."""

from dataclasses import replace

import pytest

from mst_train.config import KeepConfig
from mst_train.plan.choose import choose, describe
from mst_train.plan.config import configured_target, read
from mst_train.plan.keep import fill
from mst_train.plan.predict import predict

LLAMA = [
    "model=llama3_8b",
    "model.num_layers=6",
    "plan.device=h100_80gb",
    "precision=bf16",
    "memory.policy=mst",
]
NOTHING = KeepConfig(0, 0, 0, 0, 0)
PIECES = ("attention", "keys", "queries", "output", "mlp")


def filled(*arguments, room=None, share=None):
    """What is kept, with this many bytes more than without, or this share of what all takes."""
    config = read([*LLAMA, *arguments])
    target = configured_target(config)
    asked = config.memory.keep
    free = {name: 0 for name in PIECES if getattr(asked, name) == "auto"}
    lean = with_keep(config, replace(asked, **free))
    least = predict(lean, target).simulation.peak_bytes
    if share is not None:
        everything = replace(asked, **dict.fromkeys(free, "all"))
        most = predict(with_keep(config, everything), target).simulation.peak_bytes
        room = int(share * (most - least)) + 2**16
    target = replace(target, budget_bytes=least + room)
    calls = []

    def predicted(config):
        calls.append(config)
        return predict(config, target)

    found = fill(predict(lean, target), asked, predicted)
    assert len(calls) <= 3
    return found


def with_keep(config, keep):
    return replace(config, memory=replace(config.memory, keep=keep))


def counts(found):
    return [getattr(found.config.memory.keep, name) for name in PIECES]


def test_with_no_room_nothing_is_kept():
    assert filled("data.sequence_length=65536", room=0) is None


@pytest.mark.parametrize("length", [2048, 8192])
def test_with_room_for_everything_everything_is_kept(length):
    found = filled(f"data.sequence_length={length}", share=1)
    assert counts(found) == [found.config.model.num_layers] * 5


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_what_is_kept_fits_and_leaves_no_room_for_more(share):
    found = filled("data.sequence_length=8192", share=share)
    assert found.fits
    layers = found.config.model.num_layers
    for name in PIECES:
        kept = getattr(found.config.memory.keep, name)
        if kept < layers:
            more = with_keep(found.config, replace(found.config.memory.keep, **{name: kept + 1}))
            if not predict(more, found.target).fits:
                return
    raise AssertionError("there was room for another")


def test_more_room_is_less_time():
    seconds = [
        filled("data.sequence_length=8192", share=share).seconds for share in (0.1, 0.4, 0.7, 1)
    ]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]


def test_attention_comes_first_where_sequences_are_long_and_keys_where_they_are_short():
    """Of the same bytes, attention's save N/2 operations, keys' 2 D, and others' D."""
    assert counts(filled("data.sequence_length=65536", share=0.05)) == [3, 0, 0, 0, 0]
    short = ["data.sequence_length=512", "memory.block_chunk_tokens=128", "optimizer=in_backward"]
    assert counts(filled(*short, share=0.05)) == [0, 6, 0, 0, 0]
    assert counts(filled(*short, share=0.9)) == [6, 6, 6, 6, 5]


def test_a_peak_elsewhere_leaves_room():
    """That of the optimizer, whose states are there when nothing is kept any more."""
    assert counts(filled("data.sequence_length=512", share=0)) == [6] * 5


def test_what_is_asked_for_stays():
    found = filled(
        "data.sequence_length=8192", "memory.keep.attention=1", "memory.keep.mlp=0", share=1
    )
    layers = found.config.model.num_layers
    assert counts(found) == [1, layers, layers, layers, 0]


def test_auto_names_what_it_keeps():
    config = read([*LLAMA, "memory.policy=auto", "data.sequence_length=16384"])
    target = configured_target(config)
    vanilla, everything, nothing = (
        predict(
            replace(config, memory=replace(config.memory, policy=policy, keep=keep)), target
        ).simulation.peak_bytes
        for policy, keep in (
            ("vanilla", KeepConfig()),
            ("mst", KeepConfig(*["all"] * 5)),
            ("mst", NOTHING),
        )
    )
    assert nothing < everything < vanilla
    between = replace(target, budget_bytes=(nothing + everything) // 2, host_budget_bytes=0)
    found = choose(config, between)
    assert found.chosen.config.memory.policy == "mst"
    assert describe(found.chosen).startswith("mst, keeping attention, keys")
    assert "of 6 blocks" in describe(found.chosen)
    assert found.chosen.seconds < min(
        p.seconds for p in found.compared if p.fits and p is not found.chosen
    )
