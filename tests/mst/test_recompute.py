"""Block recomputation: the same numbers, and only the work and memory that it promises."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mst_train.mst.mlp as mlp_module
from mst_train.attention.select import CpuKernel, ReferenceKernel
from mst_train.memory.tracker import MemoryTracker
from mst_train.mst import (
    ATTENTION,
    MLP,
    OUTPUT,
    attend,
    linear,
    mini_sequence_mlp,
    recompute_block,
)
from mst_train.mst.offload import HostBudgetError, Offload

CPU = torch.device("cpu")
HIDDEN, HEADS, TOKENS = 16, 4, 40


class CountingKernel(CpuKernel):
    def __init__(self):
        self.forwards = self.backwards = 0

    def forward(self, *arguments):
        self.forwards += 1
        return super().forward(*arguments)

    def backward(self, *arguments):
        self.backwards += 1
        return super().backward(*arguments)


class Block(nn.Module):
    """A pre-norm block; with ``post_norm`` something reads the MLP's result (as in Gemma-2)."""

    def __init__(self, kernel, post_norm=False, hidden=HIDDEN):
        super().__init__()
        self.kernel = kernel
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.post_norm = nn.LayerNorm(hidden) if post_norm else nn.Identity()
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.output = nn.Linear(hidden, hidden, bias=False)
        self.gate_up = nn.Parameter(torch.randn(2, 3 * hidden, hidden) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(hidden, 3 * hidden) / (3 * hidden) ** 0.5)

    def forward(self, x, scale=1.0):
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        out = attend(self.kernel, q, k, v).flatten(2)
        x = x + linear(self.output, out, OUTPUT) * scale
        gate, up = self.gate_up
        mlp = mini_sequence_mlp(self.mlp_norm(x), gate, up, self.down, chunk_tokens=16)
        return x + self.post_norm(mlp)


def make_stack(layers=3, post_norm=False, kernel=None, dtype=torch.float64, hidden=HIDDEN):
    torch.manual_seed(0)
    kernel = kernel or CpuKernel()
    blocks = [Block(kernel, post_norm, hidden) for _ in range(layers)]
    stack = nn.ModuleList(blocks).to(dtype)
    x = torch.randn(2, TOKENS // 2, hidden, dtype=dtype)
    return stack, x


def gradients(stack, x, run):
    x = x.clone().requires_grad_()
    stack.zero_grad()
    y = x
    for block in stack:
        y = run(block, y)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in stack.parameters())]


def plain(block, x):
    return block(x)


OFFLOADS = {"device": None, "host": Offload(CPU)}
KEEPS = [(), (ATTENTION,), (OUTPUT, ATTENTION, MLP)]


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("kernel", [CpuKernel, ReferenceKernel])
def test_equals_the_block(kernel, post_norm, keep, offload):
    stack, x = make_stack(post_norm=post_norm, kernel=kernel())
    expected = gradients(stack, x, plain)
    expected = [t.clone() for t in expected]
    actual = gradients(
        stack,
        x,
        lambda block, y: recompute_block(block, y, keep=keep, offload=OFFLOADS[offload]),
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_chosen_tensors():
    """torch.autograd.grad, as a user or a test asks for some gradients only."""
    stack, x = make_stack()
    weights = [stack[0].output.weight, stack[2].down]
    y = x
    for block in stack:
        y = block(y)
    expected = torch.autograd.grad(y.sum(), weights)
    y = x
    for block in stack:
        y = recompute_block(block, y)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), weights), expected)


def test_frozen_weights_and_other_arguments():
    """Frozen parameters change what autograd saves; a tensor argument gets its gradient."""
    stack, x = make_stack()
    for p in (stack[0].qkv.weight, stack[1].down, stack[2].gate_up):
        p.requires_grad_(False)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    expected = gradients(stack, x, lambda block, y: block(y, scale))
    expected = [t if t is None else t.clone() for t in [*expected, scale.grad]]
    scale.grad = None
    actual = gradients(stack, x, lambda block, y: recompute_block(block, y, scale))
    torch.testing.assert_close([*actual, scale.grad], expected, rtol=1e-12, atol=1e-12)


def test_without_gradients_nothing_is_kept():
    stack, x = make_stack()
    with torch.no_grad(), MemoryTracker() as tracker:
        y = recompute_block(stack[0], x)
        assert tracker.live_bytes == y.nbytes
    assert torch.equal(y, stack[0](x))


@pytest.mark.parametrize(("keep", "per_block"), [((ATTENTION,), 1), ((), 2)])
def test_attention_runs_forward_as_often_as_promised(keep, per_block):
    kernel = CountingKernel()
    stack, x = make_stack(kernel=kernel)
    gradients(stack, x, lambda b, y: recompute_block(b, y, keep=keep))
    assert (kernel.forwards, kernel.backwards) == (per_block * len(stack), len(stack))


@pytest.mark.parametrize(("post_norm", "expected"), [(False, 11), (True, 14)])
def test_mlp_products(monkeypatch, post_norm, expected):
    """3 forward, 2 to rebuild gate and up, 6 backward; 3 more where a norm reads the result."""
    stack, x = make_stack(layers=1, post_norm=post_norm)
    products = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal products
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                left, right = args[-2:]
                products += {*left.shape, *right.shape} == {TOKENS, HIDDEN, 3 * HIDDEN}
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(mlp_module, "resolve_chunk_tokens", lambda c, n, *_: n)
    with Counter():
        gradients(stack, x, recompute_block)
    qkv = 4  # has the shape of the MLP's: forward, re-run, and two in the backward
    assert products - qkv == expected


def test_memory_between_forward_and_backward():
    stack, x = make_stack(layers=4, dtype=torch.float32, hidden=64)
    hidden = x.nbytes
    for keep, offload, per_block in (
        ((), None, 1),
        ((ATTENTION,), None, 2 + 1 / 16),  # lse: one number for each head of 16
        ((ATTENTION, MLP), None, 8 + 1 / 16),
        ((ATTENTION,), Offload(CPU), 0),
    ):
        y = x
        with MemoryTracker() as tracker:
            for block in stack:
                y = recompute_block(block, y, keep=keep, offload=offload)
            host = offload.host_bytes if offload else 0
            # The first input was there before; the last output is alive.
            kept = tracker.live_bytes - hidden + (0 if offload else hidden)
        assert kept == pytest.approx(4 * per_block * hidden, abs=hidden / 100)
        if offload:
            assert host == pytest.approx(4 * (2 + 1 / 16) * hidden, abs=hidden / 100)
        y.sum().backward()


def test_tensors_are_freed_as_the_backward_goes():
    """The peak of the backward holds one block's tensors, however many blocks there are."""
    peaks = []
    for layers in (2, 6):
        stack, x = make_stack(layers=layers, dtype=torch.float32, hidden=64)
        for p in stack.parameters():
            p.grad = torch.zeros_like(p)
        y = x
        for block in stack:
            y = recompute_block(block, y)
        loss = y.sum()
        with MemoryTracker() as tracker:
            loss.backward()
        peaks.append(tracker.peak_bytes)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


def test_a_second_backward_through_a_retained_graph():
    stack, x = make_stack(layers=1)
    x.requires_grad_()
    y = recompute_block(stack[0], x).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, x)[0], first[0])


def test_a_block_that_changes_is_refused():
    calls = []

    def block(x):
        calls.append(1)
        return x.exp().exp() if len(calls) == 1 else x.exp()

    y = recompute_block(block, torch.ones(3, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match="saved fewer tensors when it ran again"):
        y.backward()

    def other(x):
        calls.append(1)
        return x.exp() if len(calls) == 3 else x[:2].exp().sum() + x * 0

    y = recompute_block(other, torch.ones(3, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match="saved other tensors when it ran again"):
        y.backward()


def test_a_block_that_handles_all_exceptions():
    """The end of the re-run is not an exception for the block to swallow."""

    def block(x):
        try:
            return x.exp() * 2
        except Exception:
            return x

    x = torch.ones(3, requires_grad=True)
    recompute_block(block, x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().exp())


def test_an_exception_in_the_re_run_leaves_nothing_behind():
    stack, x = make_stack(layers=1)
    calls = []

    def failing(y):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("user's own")
        return stack[0](y)

    loss = recompute_block(failing, x.requires_grad_()).sum()
    with pytest.raises(KeyError, match="user's own"):
        loss.backward()
    expected = [t.clone() for t in gradients(stack, x.detach(), plain)]
    torch.testing.assert_close(gradients(stack, x.detach(), recompute_block), expected)


def test_an_input_changed_in_place_is_refused():
    stack, x = make_stack(layers=1)
    h = x.requires_grad_() * 1
    y = recompute_block(stack[0], h)
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_inside_a_compiled_function():
    stack, x = make_stack(layers=1)
    expected = [t.clone() for t in gradients(stack, x, plain)]
    compiled = torch.compile(lambda y: recompute_block(stack[0], y), backend="aot_eager")
    actual = gradients(stack, x, lambda block, y: compiled(y))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_gradients_are_refused():
    stack, x = make_stack(layers=1)
    y = stack[0](x.requires_grad_())
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_nothing_leaks_over_many_steps():
    offload = Offload(CPU)
    stack, x = make_stack()

    def step():
        gradients(stack, x, lambda block, y: recompute_block(block, y, offload=offload))

    step()
    host, live = offload.host_bytes, None
    with MemoryTracker() as tracker:
        for _ in range(20):
            step()
            stack.zero_grad()
            live = live if live is not None else tracker.live_bytes
            assert tracker.live_bytes == live
    assert offload.host_bytes == host


def test_an_abandoned_graph_gives_its_buffers_back():
    offload = Offload(CPU)
    stack, x = make_stack(layers=1)
    sizes = set()
    for _ in range(3):
        y = recompute_block(stack[0], x.clone().requires_grad_(), offload=offload)
        sizes.add(offload.host_bytes)
        del y
    assert len(sizes) == 1


def test_host_budget():
    stack, x = make_stack()
    kept = x.nbytes * 2 + TOKENS * HEADS * 8  # input, attention's result and log-sum-exp

    def run(budget):
        offload = Offload(CPU, budget_bytes=budget)
        gradients(stack, x, lambda block, y: recompute_block(block, y, offload=offload))
        return offload.host_bytes

    assert run(3 * kept) == 3 * kept
    with pytest.raises(HostBudgetError, match=r"raise memory\.host_budget_gib"):
        run(3 * kept - 1)


def test_buffers_of_another_length_replace_those_of_the_last():
    offload = Offload(CPU, budget_bytes=10_000)
    for rows in (100, 200, 150):
        stored = offload.store([torch.full((rows,), 1.0, dtype=torch.float64)] * 5)
        assert all(torch.equal(t, torch.ones(rows, dtype=torch.float64)) for t in stored.load())
        del stored
        assert offload.host_bytes <= 10_000
