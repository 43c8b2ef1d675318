"""Predictions: what they count, and the promises about Llama3-8B on 80 GB."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

import mst_train.memory.extrapolate as extrapolate
import mst_train.memory.fakes as stand_ins
from mst_train.distributed.exchange import busiest, choose_exchange, sent_bytes
from mst_train.memory.devices import DEVICES, find_device
from mst_train.memory.extrapolate import with_length
from mst_train.memory.simulate import simulate
from mst_train.memory.simulated_step import SimulatedStep
from mst_train.memory.tracker import KINDS
from mst_train.model.flops import parameter_count, training_flops
from mst_train.mst import attention_chunk
from mst_train.mst.sharing.keys import KeyMap
from mst_train.plan.__main__ import main
from mst_train.plan.choose import longest
from mst_train.plan.config import configured_target, read
from mst_train.plan.plot import memory_figure
from mst_train.plan.predict import LABELS, predict
from mst_train.plan.rates import rates
from mst_train.plan.speed import seconds

GIB = 2**30
LLAMA3 = ["+experiment=llama3_8b_seq60k"]
GEMMA2 = ["+experiment=gemma2_9b_seq36k"]
NOT_IN_BACKWARD = ["optimizer.in_backward=false"]


@functools.cache
def predicted(*arguments):
    config = read(arguments)
    return predict(config, configured_target(config))


def test_weights_and_states_are_those_of_the_model():
    found = predicted(*LLAMA3).simulation
    parameters = parameter_count(read(LLAMA3).model)
    assert found.breakdown["parameters"] == pytest.approx(2 * parameters, rel=1e-4)
    assert found.breakdown["optimizer"] == pytest.approx(4 * parameters, rel=1e-3)


def test_flops_are_the_models_and_what_is_recomputed():
    """Keeping everything: the model's own, but for attention's backward (2.5 forwards, not 2)."""
    config = read([*LLAMA3, "memory.policy=vanilla", "data.sequence_length=8192"])
    work = predict(config, configured_target(config)).simulation.work
    counted = work.product_flops + 3 * work.attention_forward_flops
    assert counted == pytest.approx(training_flops(config.model, 8192), rel=1e-6)
    assert work.attention_backward_flops == pytest.approx(2.5 * work.attention_forward_flops)


def test_products_of_each_policy():
    """MLP products: 9 with everything kept, 11 with the method.

    Plain recomputation has 11 too, because torch's stops once everything saved is there again:
    before the down projection.
    """
    length, layers, hidden, wide = 8192, 32, 4096, 14336
    one = 2 * length * hidden * wide * layers

    def products(*memory):
        config = read([*LLAMA3, f"data.sequence_length={length}", *memory])
        return predict(config, configured_target(config)).simulation.work.product_flops

    vanilla = products("memory.policy=vanilla")
    one_chunk = "memory.block_chunk_tokens=8192"
    projections = 2 * length * hidden * 2 * (4096 + 1024) * layers  # q, k, v and output
    assert products("memory.policy=recompute") - vanilla == pytest.approx(2 * one + projections)
    method = products("memory.policy=mst", one_chunk)
    assert method - vanilla == pytest.approx(2 * one + projections)


@pytest.fixture
def in_full(monkeypatch):
    """simulate without extrapolation."""

    def run(config, device):
        with monkeypatch.context() as patch:
            patch.setattr(extrapolate, "_SHALLOW", 10**6)
            patch.setattr(extrapolate, "_MANY_CHUNKS", 10**9)
            return simulate(config, device)

    return run


def assert_same(found, expected):
    assert found.allocated_bytes == pytest.approx(expected.allocated_bytes, rel=1e-9)
    assert found.breakdown == pytest.approx(expected.breakdown, rel=1e-9)
    assert found.host_bytes == pytest.approx(expected.host_bytes, rel=1e-9)
    assert dataclasses.asdict(found.work) == pytest.approx(dataclasses.asdict(expected.work))
    assert found.policy == expected.policy


@pytest.mark.parametrize(
    "arguments",
    [
        [*LLAMA3, "data.sequence_length=16384", "model.num_layers=9"],
        pytest.param(
            [*GEMMA2, "data.sequence_length=9216", "model.num_layers=12", "memory.offload=host"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [*GEMMA2, "data.sequence_length=9216", "model.num_layers=10", *NOT_IN_BACKWARD],
            marks=pytest.mark.slow,
        ),
        ["+experiment=llama3_8b_vanilla_seq5k", "model.num_layers=7"],
        ["model=llama_tiny", "model.num_layers=8", "train.accumulation_steps=3"],
    ],
)
def test_deep_models_are_extrapolated_exactly(in_full, arguments):
    config, device = read(arguments), find_device("a100_80gb")
    assert_same(simulate(config, device), in_full(config, device))


@pytest.mark.parametrize(
    ("given", "tokens", "expected"),
    [
        (["memory.offload=host"], 12288, (4096, 6144, 8192)),
        (["memory.keep.attention=0"], 12288, (4096, 6144, 8192)),
        ([], 12288, (4096, 6144, 8192)),
        (["parallel.sequence_exchange=keys"], 32768, (8192, 12288, 16384)),
        (["parallel.sequence_exchange=heads"], 32768, (8192, 12288, 16384)),
    ],
)
def test_long_sequences_are_extrapolated_exactly(in_full, monkeypatch, given, tokens, expected):
    for module in (extrapolate, stand_ins, attention_chunk):
        monkeypatch.setattr(module, "KEYS_AT_ONCE", 1024)
    arguments = ["model=llama_tiny", "model.num_layers=1", f"data.sequence_length={tokens}"]
    arguments += ["memory.block_chunk_tokens=512", "memory.head_chunk_tokens=256", *given]
    arguments += ["precision=bf16"]  # in fp32 attention is torch's own, which has no chunks
    if tokens == 32768:
        arguments += ["parallel.sequence_parallel=2"]
    config, device = read(arguments), find_device("a100_80gb")
    step = SimulatedStep.of(config, device, per_machine=2)
    assert extrapolate._shorter_lengths(step, config) == expected
    assert_same(simulate(config, device), in_full(config, device))


SHARED = [
    *("model=llama_tiny", "model.num_layers=3", "model.num_heads=8", "model.num_kv_heads=4"),
    *("data.sequence_length=8192", "precision=bf16", "parallel.sequence_parallel=4"),
]
WINDOWS = ["model.sliding_window=1500", "model.sliding_window_pattern=[sliding,full,full]"]


@pytest.mark.parametrize("per_machine", [4, 2, 1])
@pytest.mark.parametrize(
    "given",
    [
        ["parallel.sequence_exchange=heads"],
        ["parallel.sequence_exchange=heads", "parallel.exchange_heads=1", "model.num_kv_heads=8"],
        ["parallel.sequence_exchange=keys", "parallel.exchange_heads=1"],
        ["parallel.sequence_exchange=keys", *WINDOWS],
        ["parallel.sequence_exchange=both"],
        ["parallel.sequence_exchange=both", "train.micro_batch_size=2", *WINDOWS],
    ],
)
def test_what_processes_exchange(given, per_machine):
    """Of the process that gets the most: in both directions as much as in its busier one."""
    config = read([*SHARED, *given])
    exchange = choose_exchange(config, per_machine, "cuda")
    found = simulate(config, DEVICES["a100_80gb"], gpus=4, per_machine=per_machine).work
    places = busiest(config, exchange)
    heads, _ = sent_bytes(config, places)
    head = config.train.micro_batch_size * config.model.head_dim
    its_keys = config.model.num_kv_heads // exchange.heads
    # Keys and values twice in bf16, and their gradients in fp32.
    keys = sum(
        2 * its_keys * head * max(seen.sent, seen.received) * (2 * 2 + 4)
        for layer in range(config.model.num_layers)
        for seen in [KeyMap(places, config.data.sequence_length, config.model.window(layer))]
    )
    assert found.peer_bytes + found.network_bytes == heads + keys
    if per_machine == 4:
        assert found.network_bytes == 0
    elif per_machine == 1:
        assert found.peer_bytes == 0
    elif exchange.name == "both":
        assert (found.peer_bytes, found.network_bytes) == (heads, keys)
    awaited = found.awaited_peer_bytes + found.awaited_network_bytes
    assert (awaited < heads + keys) == (exchange.keys_at_once < its_keys)


def test_windows_cost_less_than_whole_attention():
    mistral = ("+experiment=mistral_7b_seq70k", "model.num_layers=1")
    whole = predicted(*mistral, "model.sliding_window=null").simulation.work
    windowed = predicted(*mistral).simulation.work
    window, length = 4096, 71680
    share = (window * length - window**2 / 2) / (length**2 / 2)
    ratio = windowed.attention_backward_flops / whole.attention_backward_flops
    assert ratio == pytest.approx(share, rel=0.01)


@pytest.mark.slow
def test_the_methods_reach_on_80_gib():
    """100K tokens without offload; 500K with it and 512 GiB of host memory."""
    assert predicted("+experiment=llama3_8b_seq100k").fits
    offloaded = predicted("+experiment=llama3_8b_seq500k_offload")
    assert offloaded.fits
    assert offloaded.config.data.sequence_length >= 500_000
    assert offloaded.simulation.host_bytes < 512 * GIB
    assert offloaded.target.budget_bytes < 80 * GIB


def test_sequence_parallel_scales():
    """Twice the GPUs hold twice the sequence with the same memory on each."""
    two = predicted("+experiment=llama3_8b_seq120k_2gpu").simulation
    four = predicted("+experiment=llama3_8b_seq240k_4gpu").simulation
    assert four.peak_bytes == pytest.approx(two.peak_bytes, rel=0.01)


def test_zero_shares_states_out():
    def breakdown(stage):
        arguments = [*LLAMA3, "optimizer.in_backward=false", "memory.policy=mst"]
        arguments += [
            "precision=bf16_master",
            f"parallel.zero_stage={stage}",
            "plan.gpus=8",
            "data.sequence_length=8192",
        ]
        return predicted(*arguments).simulation.breakdown

    whole = breakdown(0)
    assert breakdown(1)["optimizer"] == pytest.approx(whole["optimizer"] / 8, rel=1e-3)
    assert breakdown(1)["parameters"] == whole["parameters"]
    assert breakdown(3)["parameters"] == pytest.approx(whole["parameters"] / 8, rel=1e-3)


def test_offload_moves_bytes_to_the_host():
    config = read([*LLAMA3, "memory.offload=host", "memory.keep.attention=all"])
    found = predict(config, configured_target(config)).simulation
    tokens, layers = config.data.sequence_length, config.model.num_layers
    kept = 2 * 8192 + 32 * 4 + 2 * 2048  # block's input, attention's result, lse, keys and values
    # The last block's result, which leaves and comes back twice, and gradients, which there are of
    # one more than blocks. Blocks read their inputs in the forward as well.
    assert found.host_bytes == pytest.approx(tokens * (layers * kept + 2 * 8192), rel=0.001)
    travelled = 2 * layers * kept + 8192 * (3 + 2 * (layers + 1) + layers - 1)
    assert found.work.link_bytes == pytest.approx(tokens * travelled, rel=0.001)


def test_time_is_work_over_rates():
    device = DEVICES["a100_80gb"]
    found = simulate(read(LLAMA3), device)
    speed = rates(device, torch.bfloat16)
    assert seconds(found, speed, device) > found.work.flops / device.bf16_flops
    assert rates(find_device("80"), torch.bfloat16) is None
    here = rates(find_device("cpu"), torch.float32)
    assert here.products > 1e9 and here.memory > 1e8
    assert here.source.startswith("measured")


def test_longest_rounds_down_to_1024():
    config = read(["model=llama_tiny", "memory.device_budget_gib=0.2", "plan.device=cpu"])
    target = configured_target(config)
    found = longest(config, target)
    length = found.config.data.sequence_length
    assert length % 1024 == 0
    assert found.fits
    assert not predict(with_length(config, length + 1024), target).fits


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_devices(name):
    device = find_device(name)
    assert device.kind == "cuda"
    size = int("".join(c for c in name.rpartition("_")[2] if c.isdigit()) or 0)
    if name.endswith("gb"):
        assert 0.9 * size < device.memory_bytes / GIB < size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan.device=a1000"], "plan.device=a1000 is not known: name one of a100_40gb"),
        (["plan.device=-5"], "plan.device=-5 is not known"),
        (["memory.device_budget_gib=-1"], "memory.device_budget_gib=-1.0 must be greater than 0"),
        (["memory.host_budget_gib=0"], "memory.host_budget_gib=0.0 must be greater than 0"),
        ([*LLAMA3, "plan.device=rtx3090_24gb", "memory.device_budget_gib=4"], "weights alone take"),
        (["plan.gpus=3", "parallel.sequence_parallel=2"], "plan.gpus=3 is not a multiple"),
        (["plan.output=xml"], "plan.output=xml is not one of table, json"),
        (["plan.sweep=[0]"], "plan.sweep=0 must be at least 2"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_json_is_one_object_on_stdout(capsys):
    assert main(["model=llama_tiny", "plan.device=2", "plan.output=json", "plan.search=true"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is True
    assert report["budget_bytes"] == 2 * GIB
    assert report["peak_bytes"] == sum(report["breakdown"].values())
    assert report["predicted_step_seconds"] is None
    assert report["max_sequence_length"] % 1024 == 0
    assert set(report["breakdown"]) == {*KINDS, "overhead"}
    for key in ("host_bytes", "host_budget_bytes", "flops_per_step", "policy", "head_chunk_tokens"):
        assert key in report


def test_what_torch_reserves_decides_on_a_gpu(capsys, monkeypatch):
    """By the rules for segments that the environment names; on a CPU there is no such thing."""

    def report(device, segments="expandable_segments:True"):
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", segments)
        arguments = ["model=llama_tiny", f"plan.device={device}", "plan.output=json"]
        assert main([*arguments, "data.sequence_length=1024"]) == 0
        return json.loads(capsys.readouterr().out)

    growing, fixed = report("2"), report("2", "expandable_segments:False")
    for found in (growing, fixed):
        assert found["allocated_bytes"] < found["reserved_bytes"] < found["peak_bytes"]
        assert found["peak_bytes"] == sum(found["breakdown"].values())
        assert found["peak_bytes"] - found["reserved_bytes"] == 544 * 2**20
    assert growing["allocated_bytes"] == fixed["allocated_bytes"]
    assert growing["reserved_bytes"] != fixed["reserved_bytes"]
    short = report((growing["peak_bytes"] - 2**20) / GIB)
    assert short["reserved_bytes"] < growing["reserved_bytes"] and short["fits"]
    none = report((growing["allocated_bytes"] + 500 * 2**20) / GIB)
    assert none["peak_bytes"] > none["budget_bytes"] and not none["fits"]
    assert report("cpu")["reserved_bytes"] is None


def test_table_and_sweep(tmp_path, capsys):
    assert main(["model=llama_tiny", "plan.device=a100_80gb", "precision=bf16"]) == 0
    table = capsys.readouterr().out
    assert "at the peak" in table
    assert "reserved by torch" in table
    assert "tokens/s" in table
    folder = tmp_path / "sweep"
    arguments = ["model=llama_tiny", "plan.device=a100_80gb", "plan.sweep=[1024,2048,4096]"]
    assert main([*arguments, f"plan.dir={folder}"]) == 0
    assert (folder / "sweep.png").stat().st_size > 10_000
    assert len(json.loads((folder / "sweep.json").read_text())) == 3
    assert (folder / "sweep.md").read_text().count("fits") == 3


@pytest.mark.parametrize("lengths", [(1024, 1536, 65536, 524288), (1536,)])
def test_a_sweeps_picture_has_a_tick_and_a_dot_for_each_length(lengths):
    reports = []
    for number, length in enumerate(lengths, 1):
        parts = dict.fromkeys(LABELS, number * GIB)
        peak = {"peak_bytes": sum(parts.values()), "budget_bytes": 20 * GIB, "device": "a GPU"}
        reports.append({"sequence_length": length, "breakdown": parts, **peak})
    figure = memory_figure(reports[::-1], "a model")
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    assert all(np.ptp(area.get_paths()[0].vertices[:, 0]) > 0 for area in axes.collections)
    dots = next(line for line in axes.lines if line.get_marker() == "o")
    assert [tick * 1024 for tick in axes.get_xticks()] == list(lengths)
    named = [tick.get_text() for tick in axes.get_xticklabels()]
    assert named == (["1K", "1,536", "64K", "512K"] if len(lengths) == 4 else ["1,536"])
    assert [x * 1024 for x in dots.get_xdata()] == list(lengths)
    assert list(dots.get_ydata()) == [8 * number for number, _ in enumerate(lengths, 1)]
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
