"""What overlaps on a GPU, in any order that its streams allow: the numbers are a CPU's.

Each check is also run on the same code with one mistake in it, which it has to find.
"""

import functools
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from late_gpu import CUDA, LateGpu, schedules
from torch import nn

import mst_train.mst.offload
import mst_train.optim.host
from mst_train.config import OptimizerConfig

CPU = torch.device("cpu")
EXAMPLES = [200, pytest.param(2000, marks=pytest.mark.exhaustive)]
WIDTHS = (2, 90, 2)
"""Of what the blocks keep beside their input: [3, 90] takes more than one unit of memory."""


def with_mistake(module, right, wrong):
    """The module with one place of its source changed."""
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1, f"{right} is no place in {module.__name__}"
    changed = ModuleType(module.__name__)
    exec(compile(source.replace(right, wrong), module.__file__, "exec"), changed.__dict__)
    return changed


def check(test, examples, *strategies, **how):
    """Run a test on so many examples, the same ones each time."""
    chosen = settings(max_examples=examples, derandomize=True, database=None, **how)
    chosen(given(*strategies)(test))()


def assert_found(test, *strategies):
    with pytest.raises(AssertionError):
        check(test, EXAMPLES[0], *strategies, phases=[Phase.generate])


# --- what waits on the host --------------------------------------------------------------------


def offloaded_steps(put, offload, given_up):
    """Gradients of some steps: whole numbers, in which no order of operations shows.

    What goes from block to block waits on the host too: it is put there, and a block in the forward
    keeps the place of it.

    put: a tensor onto the device. given_up: for each step the block at which its backward ends, as
    by an error; None: it ends as it should.
    """
    weights = [put(torch.full((w,), w % 5 + 2.0, dtype=torch.float64)) for w in WIDTHS]
    gradients = []
    for step, last in enumerate(given_up):
        x, place = put(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) + step), None
        waiting = []
        for weight in weights:
            inner = x[:, None] * weight
            waiting.append(offload.store([place or x, inner]))
            place = offload.put((inner.sum(1) + x) % 257)
            del x, inner
            [x] = offload.back([place]).ready()
        place = offload.put(x + 1)
        del x
        for block in reversed(range(len(weights))):
            stored, returning = waiting.pop(), offload.back([place])
            x, inner = stored.load()
            if block == last:
                gradients.append(x)
                break
            [gradient] = returning.ready()
            gradients.append((gradient * x + inner.sum(1)) % 257)
            place = offload.put(gradients[-1])
            del x, inner, stored, returning, gradient
    return [gradient.cpu() for gradient in gradients]


PROGRAMS = st.lists(st.none() | st.integers(1, len(WIDTHS) - 1), min_size=2, max_size=3).map(tuple)


@functools.cache
def on_cpu(given_up):
    return offloaded_steps(torch.clone, mst_train.mst.offload.Offload(CPU), given_up)


def late_test(steps, on_cpu, problem=0):
    """That ``steps(gpu, program)`` come to the CPU's numbers, however late work is done."""

    def test(schedule, program):
        with LateGpu(schedule, problem) as gpu:
            assert all(map(torch.equal, steps(gpu, program), on_cpu(program)))
            assert not gpu.cudart.locked

    return test


def offload_test(module, problem=0):
    def steps(gpu, given_up):
        return offloaded_steps(gpu.tensor, module.Offload(CUDA), given_up)

    return late_test(steps, on_cpu, problem)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_offloading(examples):
    check(offload_test(mst_train.mst.offload), examples, schedules, PROGRAMS)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        pytest.param(
            "self._out.wait_stream(torch.cuda.current_stream())",
            "pass",
            id="tensors leave before they are computed",
        ),
        pytest.param(
            "torch.cuda.current_stream().wait_event(done)",
            "pass",
            id="leaving tensors are forgotten without waiting",
        ),
        pytest.param(
            "self._leaving.append((leaving,",
            "self._leaving.append(((),",
            id="leaving tensors are not held",
        ),
        pytest.param(
            "self.left: Any = None",
            "self.left = buffers.give_back(self.buffer)",
            id="buffers are given back too soon",
        ),
        pytest.param(
            "with torch.cuda.stream(self._back)",
            "with torch.cuda.stream(self._out)",
            id="the directions mixed up",
        ),
        pytest.param(
            "torch.cuda.current_stream().wait_event(self._arrived)",
            "pass",
            id="tensors are used before they are there",
        ),
        pytest.param(
            "self._back.wait_stream(torch.cuda.current_stream())",
            "pass",
            id="tensors come back into memory in use",
        ),
        pytest.param(
            "self._back.wait_event(place.left)",
            "pass",
            id="tensors set out before they have arrived on the host",
        ),
        pytest.param(
            "self._given_up = weakref.finalize(self, wait, arrived)",
            "self._given_up = weakref.finalize(self, id, arrived)",
            id="nobody waits for what is given up on its way back",
        ),
    ],
)
def test_offloading_with_a_mistake(right, wrong):
    module = with_mistake(mst_train.mst.offload, right, wrong)
    assert_found(offload_test(module), schedules, PROGRAMS)


# --- the optimizer on the host -----------------------------------------------------------------


class Products(nn.Module):
    """Two weights, of one unit of memory and of several."""

    def __init__(self, put):
        super().__init__()
        self.first = nn.Parameter(put(torch.full((300,), 0.5)))
        self.second = nn.Parameter(put(torch.full((3,), 2.0)))

    def forward(self, x):
        return ((self.first * x).sum() * self.second).sum()


def hosted_steps(module, put, steps):
    """The weights after some steps.

    steps: of each the number of micro-batches, and how it ends: by an update, with or without
    clipping, or given up.
    """
    model = Products(put)
    with mock.patch.object(module, "cpu_adam", lambda groups, **_: torch.optim.SGD(groups)):
        optimizer = module.HostOptimizer(model, OptimizerConfig(), master_weights=False)
    for step, (micro_batches, end) in enumerate(steps):
        optimizer.set_learning_rate(2.0**-10)
        for number in range(micro_batches):
            model(put(torch.arange(300.0) % 7 + step + number)).backward()
        if end == "given up":
            optimizer.zero_grad()
            continue
        if end == "clipped":
            optimizer.clip(1.0, optimizer.gradient_norm())
        optimizer.step()
    found = [parameter.detach().cpu() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter._post_accumulate_grad_hooks.clear()  # a circle, with the optimizer
    return found


ENDS = st.sampled_from(["updated", "clipped", "given up"])
STEPS = st.lists(st.tuples(st.integers(1, 2), ENDS), min_size=2, max_size=3).map(tuple)


@functools.cache
def hosted_on_cpu(steps):
    return hosted_steps(mst_train.optim.host, torch.clone, steps)


def hosted_test(module, problem=0):
    def steps(gpu, given):
        return hosted_steps(module, gpu.tensor, given)

    return late_test(steps, hosted_on_cpu, problem)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_the_optimizer_on_the_host(examples):
    check(hosted_test(mst_train.optim.host), examples, schedules, STEPS)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        pytest.param(
            'if self._device.type == "cuda"',
            "if False",
            id="nobody waits",
        ),
        pytest.param(
            "self._wait()\n        return super().gradient_norm()",
            "return super().gradient_norm()",
            id="the norm is of gradients that are not there",
        ),
        pytest.param(
            "self._wait()\n        with record_function(HOST_RANGE):\n            super().step()",
            "super().step()",
            id="the update is by gradients that are not there",
        ),
    ],
)
def test_the_optimizer_on_the_host_with_a_mistake(right, wrong):
    module = with_mistake(mst_train.optim.host, right, wrong)
    assert_found(hosted_test(module), schedules, STEPS)


def test_where_no_memory_can_be_page_locked():
    check(offload_test(mst_train.mst.offload, problem=2), 20, schedules, PROGRAMS)
    check(hosted_test(mst_train.optim.host, problem=2), 20, schedules, STEPS)
