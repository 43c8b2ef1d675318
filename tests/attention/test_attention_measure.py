"""Which kernel is chosen by its times, and who is left out."""

import logging
import math
from dataclasses import dataclass

import pytest
import torch
from formula import assert_same, in_chunks, make_documents, make_inputs, whole

from mst_train.attention import measure as attention_choice
from mst_train.attention.measure import MeasuredKernel, Problem, fastest
from mst_train.attention.select import CpuKernel, ReferenceKernel, TiledKernel
from mst_train.errors import UserError
from mst_train.mst import Scores

CPU = torch.device("cpu")
PROBLEM = Problem(CPU, torch.float32, 1, 24, 24, 4, 2, 8, Scores())


@pytest.fixture(autouse=True)
def nothing_chosen_yet(monkeypatch):
    monkeypatch.setattr(attention_choice, "_chosen", {})
    monkeypatch.setattr(attention_choice, "TOKENS_CHECKED", 20)


@dataclass(eq=False)
class Clock:
    """Runs what it is to time and says what each kernel is to have taken, turn by turn."""

    times: dict

    def __post_init__(self):
        self.turns = []
        self.shapes = []

    def __call__(self, work):
        kernel, q, k, *_ = work.args
        work()
        turn = self.turns.count(kernel)
        self.turns.append(kernel)
        self.shapes.append((q.shape[1], k.shape[1], work.args[-1]))
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
        "attention auto: tiled for 1 x 24 queries and 24 keys of torch.float32 on cpu, 4 heads"
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
        if self.fault == "longer" and q.shape[1] == PROBLEM.queries:
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
    with pytest.raises(
        UserError, match=r"(?s)auto found no kernel for 1 x 24 .*one.*other.*=tiled"
    ):
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
    assert set(attention_choice.choices().values()) == {"tiled"}


def test_one_process_measures_once_for_each_kind_of_call():
    kernels, clock = timed(cpu=[1.0], tiled=[2.0])
    q, k, v, _ = make_inputs()
    for _ in range(3):
        MeasuredKernel(kernels, Scores(), clock).forward(q, k, v)
    assert len(clock.turns) == 2 * attention_choice.ROUNDS
    MeasuredKernel(kernels, Scores(), clock).forward(q.float(), k.float(), v.float())
    assert len(clock.turns) == 4 * attention_choice.ROUNDS


def test_squares_and_rectangles_of_a_run_are_measured_at_their_lengths(monkeypatch):
    """Each may have a kernel of its own, and so may lengths that are far apart."""
    monkeypatch.setattr(attention_choice, "SHORT", 4)
    inputs = make_inputs(sequence=37)
    kernels, clock = timed(cpu=[1.0], tiled=[2.0])

    def seconds(work):
        taken = clock(work)
        queries, keys, _ = clock.shapes[-1]
        return -taken if keys > 2 * queries else taken

    actual = in_chunks(MeasuredKernel(kernels, Scores(), seconds), inputs, None, 8)
    assert_same(actual, whole(inputs, Scores()))
    squares, rectangles = {(8, 8, True)}, {(8, 8, False), (8, 16, False), (8, 24, False)}
    assert set(clock.shapes) == squares | rectangles
    chosen = attention_choice.choices()
    assert sorted(chosen.values()) == ["cpu", "cpu", "cpu", "tiled"]


def test_long_calls_are_measured_short(monkeypatch):
    monkeypatch.setattr(attention_choice, "TOKENS", 16)
    monkeypatch.setattr(attention_choice, "KEYS_AT_ONCE", 48)
    kernels, clock = timed(cpu=[1.0], tiled=[2.0])
    q, k, v, _ = make_inputs(sequence=100)
    kernel = MeasuredKernel(kernels, Scores(), clock)
    kernel.forward(q, k, v)
    kernel.forward(q[:, :20], k, v, causal=False)
    assert set(clock.shapes) == {(16, 16, True), (16, 48, False)}
    windowed, clock = timed(tiled=[2.0])
    MeasuredKernel(windowed, Scores(window=50), clock).forward(q[:, :20], k[:, :70], v[:, :70])
    assert set(clock.shapes) == {(16, 48, True)}


def test_packed_documents_have_no_kernel_that_plans_for_each_length():
    kernels, clock = timed(cpu=[2.0], tiled=[1.0])
    inputs = make_inputs()
    kernel = MeasuredKernel(kernels, Scores(), clock, for_few_lengths=("tiled",))
    documents = [0, 4, 5, 13, 26]
    assert_same(
        in_chunks(kernel, inputs, make_documents(documents), 8), whole(inputs, Scores(), documents)
    )
    assert set(attention_choice.choices().values()) == {"cpu"}
    kernel = MeasuredKernel(kernels, Scores(), clock, for_few_lengths=("tiled",))
    kernel.forward(*inputs[:3])
    assert set(attention_choice.choices().values()) == {"cpu", "tiled"}


def test_another_process_keeps_to_the_choices(monkeypatch):
    kernels, clock = timed(cpu=[2.0], tiled=[1.0])
    q, k, v, _ = make_inputs()
    MeasuredKernel(kernels, Scores(), clock).forward(q, k, v)
    choices = attention_choice.choices()
    monkeypatch.setattr(attention_choice, "_chosen", {})
    attention_choice.keep_to(choices)
    kernels, clock = timed(cpu=[1.0], tiled=[2.0])
    MeasuredKernel(kernels, Scores(), clock).forward(q, k, v)
    assert not clock.turns  # and not measured
    assert attention_choice.choices() == choices
    monkeypatch.setattr(attention_choice, "_installed", lambda device: "another machine")
    MeasuredKernel(kernels, Scores(), clock).forward(q, k, v)
    assert list(attention_choice.choices().values()) == ["tiled", "cpu"]


def test_a_choice_that_is_no_candidate_any_more_is_made_anew():
    kernels, clock = timed(cpu=[2.0], tiled=[1.0])
    q, k, v, _ = make_inputs()
    MeasuredKernel(kernels, Scores(), clock).forward(q, k, v)
    del kernels["tiled"]
    MeasuredKernel(kernels, Scores(), clock).forward(q, k, v)
    assert list(attention_choice.choices().values()) == ["cpu"]


def test_under_deterministic_algorithms_the_first_that_works_is_taken(caplog):
    kernels, clock = timed(cpu=[9.0], tiled=[1.0])
    kernels = {"broken": Broken(fault="forward"), **kernels}
    torch.use_deterministic_algorithms(True)
    try:
        with caplog.at_level(logging.INFO, logger="mst_train"):
            assert fastest(kernels, PROBLEM, clock) == "cpu"
    finally:
        torch.use_deterministic_algorithms(False)
    assert not clock.turns
    assert "(the first in order, as train.deterministic asks; without broken: " in caplog.text


def test_what_is_measured_is_like_the_call():
    q, k, _, _ = make_inputs(heads=6, kv_heads=3, size=16, dtype=torch.bfloat16)
    problem = Problem.like(q, k, Scores(window=3), causal=True, packed=True)
    shape = (2, 13, 13, 6, 3, 16)
    assert problem == Problem(
        CPU, torch.bfloat16, *shape, Scores(window=3), causal=True, packed=True
    )
    q, k, v, dout, documents, causal = problem.inputs()
    assert causal
    assert q.shape == dout.shape == (2, 13, 6, 16)
    assert k.shape == v.shape == (2, 13, 3, 16)
    assert {t.dtype for t in (q, k, v, dout)} == {torch.bfloat16}
    assert documents.offsets == [0, 6, 13, 19, 26]
    assert problem.shortened(2, 2).inputs()[-2].offsets == [0, 1, 2, 3, 4]


def test_no_random_state_is_touched():
    kernels, clock = timed(cpu=[1.0], tiled=[2.0])
    before = torch.get_rng_state()
    fastest(kernels, PROBLEM, clock)
    assert torch.equal(torch.get_rng_state(), before)
