"""Which kernel is chosen by its times, and who is left out."""

import logging
import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from formula import assert_same, in_chunks, make_documents, make_inputs, whole

from mst_train.attention import measure as attention_choice
from mst_train.attention.measure import MeasuredKernel, Problem, fastest
from mst_train.attention.select import CpuKernel, ReferenceKernel, TiledKernel
from mst_train.errors import UserError
from mst_train.mst import Scores

CPU = torch.device("cpu")
PROBLEM = Problem(CPU, torch.float32, 24, 4, 2, 8, Scores(), documents=False)


@pytest.fixture(autouse=True)
def nothing_chosen_yet(monkeypatch):
    monkeypatch.setattr(attention_choice, "_fastest", {})
    monkeypatch.setattr(attention_choice, "TOKENS_CHECKED", 20)


@dataclass(eq=False)
class Clock:
    """Runs what it is to time and says what each kernel is to have taken, turn by turn."""

    times: dict

    def __post_init__(self):
        self.turns = []
        self.lengths = []

    def __call__(self, work):
        kernel, q, *_ = work.args
        work()
        turn = self.turns.count(kernel)
        self.turns.append(kernel)
        self.lengths.append(q.shape[1])
        return self.times[kernel][turn % len(self.times[kernel])]


def timed(**times):
    """Kernels by name, and the clock that gives them these times."""
    classes = {"cpu": CpuKernel, "tiled": TiledKernel, "reference": ReferenceKernel}
    kernels = {name: classes[name]() for name in times}
    return kernels, Clock({kernels[name]: values for name, values in times.items()})


def test_the_fastest_is_chosen_and_said(caplog):
    kernels, clock = timed(cpu=[0.003], tiled=[0.001], reference=[0.002])
    with caplog.at_level(logging.INFO, logger="mst_train"):
        assert fastest(kernels, PROBLEM, clock) == "tiled"
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        "attention auto: tiled for 24 tokens of torch.float32 on cpu, 4 heads"
    )
    assert "(cpu 3 ms, tiled 1 ms, reference 2 ms)" in message


def test_medians_decide():
    kernels, clock = timed(cpu=[9.0, 2.0, 2.0, 2.0, 9.0], tiled=[3.0, 3.0, 3.0, 3.0, 1.0])
    assert fastest(kernels, PROBLEM, clock) == "cpu"


def test_kernels_take_turns():
    kernels, clock = timed(cpu=[1.0], tiled=[2.0])
    fastest(kernels, PROBLEM, clock)
    assert clock.turns == [kernels["cpu"], kernels["tiled"]] * attention_choice.ROUNDS


def test_slow_kernels_have_fewer_turns(monkeypatch):
    monkeypatch.setattr(attention_choice, "SECONDS", 0.0)
    kernels, clock = timed(cpu=[1.0], tiled=[2.0])
    assert fastest(kernels, PROBLEM, clock) == "cpu"
    assert len(clock.turns) == 2


@dataclass(eq=False)
class Broken(CpuKernel):
    """A CPU kernel with a fault."""

    fault: str = ""

    def forward(self, q, k, v, documents=None, causal=True):
        if self.fault == "forward":
            raise AssertionError("heads of 8 are too small\nand more")
        if self.fault == "memory":
            raise torch.OutOfMemoryError("no memory")
        if self.fault == "longer" and q.shape[1] == PROBLEM.tokens:
            raise RuntimeError("only short ones")
        out, lse = super().forward(q, k, v, documents, causal)
        if self.fault == "nan":
            out = out * math.nan
        return out, lse * 1.5 if self.fault == "lse" else lse

    def backward(self, dout, q, k, v, out, lse, documents=None, causal=True):
        if self.fault == "backward":
            raise NotImplementedError("forward only")
        gradients = super().backward(dout, q, k, v, out, lse, documents, causal)
        return [g * 2 if self.fault == "gradients" else g for g in gradients]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("forward", "AssertionError: heads of 8 are too small)"),
        ("backward", "NotImplementedError: forward only)"),
        ("longer", "RuntimeError: only short ones)"),
        ("memory", "OutOfMemoryError: no memory)"),
        ("nan", "ArithmeticError: its result is off by nan"),
        ("lse", "ArithmeticError: its lse is off by 50%"),
        ("gradients", "ArithmeticError: its gradient is off by 100%"),
    ],
)
def test_who_fails_or_computes_something_else_is_left_out(caplog, fault, reason):
    kernels, clock = timed(tiled=[2.0])
    kernels = {"broken": Broken(fault=fault), **kernels}
    clock.times[kernels["broken"]] = [1.0]
    with caplog.at_level(logging.INFO, logger="mst_train"):
        assert fastest(kernels, PROBLEM, clock) == "tiled"
    assert f"; without broken: {reason}" in caplog.text
    assert kernels["broken"] not in clock.turns


def test_the_same_kernel_without_a_fault_is_not_left_out():
    kernels, clock = timed(tiled=[2.0])
    kernels["whole"] = Broken()
    clock.times[kernels["whole"]] = [1.0]
    assert fastest(kernels, PROBLEM, clock) == "whole"


def test_who_fails_in_a_later_turn_is_left_out():
    kernels, clock = timed(tiled=[2.0], cpu=[1.0])

    def failing(work):
        if len(clock.turns) > 4 and work.args[0] is kernels["cpu"]:
            raise RuntimeError("the device is too hot")
        return clock(work)

    assert fastest(kernels, PROBLEM, failing) == "tiled"


def test_nobody_is_left():
    kernels = {"one": Broken(fault="forward"), "other": Broken(fault="backward")}
    with pytest.raises(UserError, match=r"(?s)auto found no kernel for 24 .*one.*other.*=tiled"):
        fastest(kernels, PROBLEM, Clock({}))
    kernels["third"] = Broken(fault="memory")
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        fastest(kernels, PROBLEM, Clock({}))


@pytest.mark.parametrize("cu_seqlens", [None, [0, 4, 5, 13, 26]])
@pytest.mark.parametrize("scores", [Scores(), Scores(window=5, softcap=1.5, scale=0.7)], ids=str)
def test_it_computes_what_it_chose(scores, cu_seqlens):
    kernels = {"cpu": CpuKernel(scores), "tiled": TiledKernel(scores)}
    clock = Clock({kernels["cpu"]: [2.0], kernels["tiled"]: [1.0]})
    kernel, inputs = MeasuredKernel(kernels, scores, clock), make_inputs()
    actual = in_chunks(kernel, inputs, make_documents(cu_seqlens), 4)
    assert_same(actual, whole(inputs, scores, cu_seqlens))
    assert kernel._chosen is kernels["tiled"]


def test_one_process_measures_once_for_each_problem():
    kernels, clock = timed(cpu=[1.0], tiled=[2.0])
    q, k, v, _ = make_inputs()
    for _ in range(3):
        MeasuredKernel(kernels, Scores(), clock).forward(q, k, v)
    assert len(clock.turns) == 2 * attention_choice.ROUNDS
    MeasuredKernel(kernels, Scores(), clock).forward(q.float(), k.float(), v.float())
    assert len(clock.turns) == 4 * attention_choice.ROUNDS


@pytest.mark.parametrize(("sequence", "measured"), [(13, 13), (200, 64)])
def test_long_sequences_are_measured_short(monkeypatch, sequence, measured):
    monkeypatch.setattr(attention_choice, "TOKENS", 64)
    kernels, clock = timed(cpu=[1.0], tiled=[2.0])
    q, k, v, _ = make_inputs(sequence=sequence)
    MeasuredKernel(kernels, Scores(), clock).forward(q, k, v)
    assert set(clock.lengths) == {measured}


def test_what_is_measured_is_like_the_call():
    q, k, _, _ = make_inputs(heads=6, kv_heads=3, size=16, dtype=torch.bfloat16)
    problem = Problem.like(q, k, Scores(window=3), make_documents([0, 13, 26]))
    assert problem == Problem(CPU, torch.bfloat16, 13, 6, 3, 16, Scores(window=3), documents=True)
    q, k, v, dout, documents = problem.inputs(13)
    assert q.shape == dout.shape == (1, 13, 6, 16)
    assert k.shape == v.shape == (1, 13, 3, 16)
    assert {t.dtype for t in (q, k, v, dout)} == {torch.bfloat16}
    assert documents.offsets == [0, 3, 6, 9, 13]
    assert problem.inputs(2)[-1].offsets == [0, 1, 2]


def test_no_random_state_is_touched():
    kernels, clock = timed(cpu=[1.0], tiled=[2.0])
    before = torch.get_rng_state()
    fastest(kernels, PROBLEM, clock)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("theirs", "chosen"),
    [([1.0, 1.0], "cpu"), ([9.0, 1.0], "tiled"), ([math.inf, 1.0], "tiled")],
)
def test_the_slowest_process_decides(monkeypatch, theirs, chosen):
    """The larger of both processes' times, so that both choose the same."""

    def all_reduce(times, op):
        assert op == dist.ReduceOp.MAX
        times.copy_(torch.maximum(times, torch.tensor(theirs, dtype=times.dtype)))

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    kernels, clock = timed(cpu=[2.0], tiled=[3.0])
    assert fastest(kernels, PROBLEM, clock) == chosen
