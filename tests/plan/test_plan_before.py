"""What the training command refuses, warns of and chooses, before it starts."""

import pytest
import torch

import mst_train.plan.before as before
from mst_train import bar
from mst_train.cli.compose import compose
from mst_train.errors import UserError
from mst_train.memory.devices import Device, device_bytes
from mst_train.plan.__main__ import main as plan
from mst_train.plan.before import before_training
from mst_train.units import GIB

CPU = torch.device("cpu")
IN_BACKWARD = ("optimizer.in_backward=true", "optimizer.max_grad_norm=null")
SMALL = ("model=llama_tiny", "data.sequence_length=1024")


def refusal(*arguments):
    with pytest.raises(UserError) as caught:
        before_training(compose(arguments), CPU)
    return str(caught.value)


def test_what_is_refused_could_not_have_worked():
    """A budget of a byte more is enough and of a byte less is not: on a CPU it is exact."""
    exact = before_training(compose(SMALL), CPU).simulation.allocated_bytes
    before_training(compose([*SMALL, f"memory.device_budget_gib={(exact + 1) / GIB}"]), CPU)
    message = refusal(*SMALL, f"memory.device_budget_gib={(exact - 1) / GIB}")
    assert f"its step needs {exact / GIB:.2f} GiB" in message
    assert "memory.device_budget_gib allows" in message


def test_advice_for_activations():
    vanilla = ("model=llama_bench", "memory.policy=vanilla", "data.sequence_length=8192")
    message = refusal(*vanilla, "memory.device_budget_gib=1")
    assert "kept activations" in message
    assert "Set memory.policy=auto or a smaller data.sequence_length" in message


def test_advice_for_states():
    paper = ("+experiment=llama3_8b_seq60k", "data.sequence_length=1024")
    message = refusal(*paper, "memory.device_budget_gib=20")
    assert "weights and their states alone are too large" in message
    needed = "precision=bf16_master and optimizer.in_backward=false"
    assert f"optimizer.offload=host with {needed}" in message
    assert "in_backward=true" not in message
    compose([*paper, "optimizer.offload=host", *needed.split(" and ")])
    ordinary = refusal(*paper, "optimizer.in_backward=false", "memory.device_budget_gib=20")
    assert "optimizer.in_backward=true with optimizer.max_grad_norm=null" in ordinary
    full = refusal(*paper, "precision=fp32", "memory.device_budget_gib=23")
    assert "precision=bf16," in full or "weights alone" in full
    muon = refusal(*paper, "optimizer.name=muon", "memory.device_budget_gib=20")
    assert "weights and their states alone are too large" in muon
    assert "offload" not in muon


@pytest.mark.parametrize(
    ("settings", "named", "left_out"),
    [
        ("", "several devices and parallel.zero_stage=3, precision=bf16, ", "more devices"),
        ("plan.gpus=2", "a smaller model, parallel.zero_stage=3, precision=bf16", "offload"),
        ("plan.gpus=2 parallel.zero_stage=3", "more devices or optimizer.offload=host", "bf16"),
        ("plan.gpus=2 parallel.zero_stage=2", "more devices, parallel.zero_stage=3 or", "backward"),
    ],
)
def test_the_planner_advises_what_can_be_set(settings, named, left_out, capsys):
    words = ("plan.device=cpu", "memory.device_budget_gib=0.03", "precision=fp32")
    assert plan([*SMALL, *words, *settings.split()]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 100 for line in printed.splitlines())
    advice = printed.partition("The weights and their states")[2].replace("\n", " ")
    assert named in advice
    assert left_out not in advice


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("parallel.zero_stage=2 precision=bf16", "set precision=bf16_master, or parallel.zero"),
        ("parallel.zero_stage=1 optimizer=in_backward", "set one of them to false or 0"),
        ("optimizer.offload=host", "set parallel.zero_stage=1, 2 or 3, or optimizer.offload"),
    ],
)
def test_the_planner_refuses_what_several_processes_cannot_train(wrong, named, capsys):
    settings = (*SMALL, "plan.device=cpu", *wrong.split())
    assert plan([*settings, "plan.gpus=2"]) == 2
    assert named in capsys.readouterr().err
    assert plan([*settings, "plan.gpus=1"]) == 0


def test_what_the_host_cannot_hold():
    offloaded = (*SMALL, "memory.offload=host")
    message = refusal(*offloaded, "memory.host_budget_gib=0.001")
    assert "what is offloaded needs" in message
    assert "memory.host_budget_gib allows 0.00 GiB" in message
    assert "memory.keep.attention=0" in message


def test_a_cpu_has_one_memory_for_both():
    config = compose([*SMALL, "memory.offload=host"])
    prediction = before_training(config, CPU).simulation
    between = prediction.allocated_bytes + prediction.host_bytes // 2
    message = refusal(*SMALL, "memory.offload=host", f"memory.device_budget_gib={between / GIB}")
    assert "offloaded" in message


@pytest.mark.parametrize(
    ("precision", "optimizer", "gib"),
    [
        ("bf16", "adamw", "44.87"),
        ("bf16", "muon", "31.87"),
        ("bf16_master", "adamw", "104.70"),
        ("bf16_master", "muon", "78.70"),
        ("fp32", "adamw", "89.75"),
    ],
)
def test_without_a_gpu_what_is_for_one_is_refused_at_once(monkeypatch, precision, optimizer, gib):
    def never(*arguments):
        raise AssertionError("a prediction was made")

    monkeypatch.setattr(before, "predict", never)
    monkeypatch.setattr(before, "device_bytes", lambda device: 24 * GIB)
    settings = (f"precision={precision}", f"optimizer.name={optimizer}")
    message = refusal("+experiment=llama3_8b_seq60k", *settings)
    assert message.startswith("there is no GPU here, and llama3_8b_seq60k needs one: its weights")
    assert f"alone take {gib} GiB, and this machine has 24.00 GiB" in message
    with pytest.raises(AssertionError, match="a prediction"):
        refusal(*SMALL)


@pytest.mark.slow
def test_a_gpu_may_try_what_is_close(monkeypatch, caplog):
    config = compose(["+experiment=llama3_8b_seq60k"])

    def on(memory_bytes):
        device = Device("a GPU", "cuda", int(memory_bytes))
        monkeypatch.setattr(before, "this_device", lambda _: device)
        return before_training(config, torch.device("cuda"))

    found = on(200 * GIB).simulation
    assert not caplog.text
    on(found.allocated_bytes * 1.005)
    assert "will probably not fit: mst" in caplog.text
    with pytest.raises(UserError, match="the cuda device has"):
        on(found.allocated_bytes / 1.06)


def test_memory_of_this_machine():
    assert GIB < device_bytes(CPU) < 2**50


@pytest.mark.parametrize(
    "arguments",
    [
        ("train.micro_batch_size=1000000", "data.sequence_length=1024"),
        ("data.sequence_length=1000000000", "memory.policy=auto"),
        ("data.sequence_length=1000000000", "parallel.sequence_parallel=2", "memory.offload=host"),
    ],
)
def test_what_no_policy_can_hold_is_refused_before_it_is_predicted(arguments, monkeypatch):
    for name in ("predict", "choose"):
        monkeypatch.setattr(before, name, None)
    message = refusal("memory.device_budget_gib=4", *arguments)
    assert "tokens alone take" in message
    assert "memory.device_budget_gib allows" in message


def test_predictions_are_counted_where_nobody_watches_a_terminal(monkeypatch, caplog):
    monkeypatch.setattr(bar, "SILENT_SECONDS", 0)
    with caplog.at_level("INFO"):
        before_training(compose([*SMALL, "memory.policy=auto"]), CPU)
    assert "predicting: 2 steps, " in caplog.text


def test_a_long_prediction_is_announced(monkeypatch, caplog):
    monkeypatch.setattr(before, "LONG", 2048)
    with caplog.at_level("INFO"):
        before_training(compose(SMALL), CPU)
        assert "predicting" not in caplog.text
        before_training(compose([*SMALL, "train.micro_batch_size=2"]), CPU)
    assert "predicting the memory of a step of 2,048 tokens" in caplog.text
