"""Blocks that run again in the backward: the right gradient, or an error that names the cause."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from mst_train.attention.select import CpuKernel
from mst_train.mst import attend, gated_mlp, mini_sequence_block, mini_sequence_mlp, recompute_block

TOKENS, HIDDEN, INTERMEDIATE = 14, 8, 12
RUNS = {
    "rows": lambda block, x: mini_sequence_block(block, CpuKernel(), x, chunk_tokens=5),
    "one piece": lambda block, x: recompute_block(block, x),
}
BOTH = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


class Block(nn.Module):
    """What comes around the MLP is for a test to say."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.gate, self.up = (nn.Linear(HIDDEN, INTERMEDIATE, bias=False) for _ in range(2))
        self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)
        self.before, self.inside, self.after = (nn.Identity() for _ in range(3))
        self.register_buffer("shift", torch.zeros(HIDDEN))
        self.double()

    def before_attention(self, x, *, queries=True):
        q, k, v = self.qkv(self.before(x + self.shift)).unflatten(-1, (6, -1)).chunk(3, dim=2)
        return (q if queries else None), k, v

    def after_attention(self, x, out, *, values=True):
        stream = x + out.flatten(2)
        weights = [module.weight for module in (self.gate, self.up, self.down)]
        if isinstance(self.after, nn.Identity):
            return stream, self.mlp(self.inside(stream), *weights, values=values)
        return stream, self.after(self.mlp(self.inside(stream), *weights))

    mlp = staticmethod(partial(mini_sequence_mlp, chunk_tokens=4))

    def forward(self, x):
        q, k, v = self.before_attention(x)
        return torch.add(*self.after_attention(x, attend(CpuKernel(), q, k, v)))


def make_x():
    return torch.randn(2, TOKENS // 2, HIDDEN, dtype=torch.float64)


def plain(block, x):
    block.mlp = lambda *tensors, values=True: gated_mlp(*tensors)
    y = block(x)
    del block.mlp
    return y


def gradients(run, block, x, others=(), seed=1):
    """Of x, of the block's parameters and of other tensors, by name."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = run(block, x)
    named = {"x": x, **{n: p for n, p in block.named_parameters() if p.requires_grad}}
    named |= {f"other {i}": other for i, other in enumerate(others)}
    found = torch.autograd.grad(y.square().sum(), list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


def assert_right(run, block, x, others=()):
    expected = gradients(plain, block, x, others)
    torch.testing.assert_close(gradients(run, block, x, others), expected, rtol=1e-12, atol=1e-12)


# --- what is at home in a block ------------------------------------------------------------------


def adapter():
    return nn.Sequential(nn.Linear(HIDDEN, 2), nn.GELU(), nn.Linear(2, HIDDEN)).double()


@BOTH
@pytest.mark.parametrize("place", ["before", "inside", "after"])
@pytest.mark.parametrize("frozen", ["nothing", "mlp", "all others", "x too"])
def test_adapters_and_frozen_parts(run, frozen, place):
    block = Block()
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(
            {"nothing": True, "mlp": name.startswith("qkv")}.get(frozen, False)
        )
    setattr(block, place, adapter())
    x = make_x()
    if frozen == "x too":  # nothing before the adapter wants a gradient
        trained = [p for p in block.parameters() if p.requires_grad]
        expected = torch.autograd.grad(plain(block, x).square().sum(), trained)
        actual = torch.autograd.grad(run(block, x).square().sum(), trained)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    else:
        assert_right(run, block, x)


def test_a_frozen_mlp_alone_before_an_adapter():
    weights = [getattr(Block(), name).weight.detach() for name in ("gate", "up", "down")]
    after = adapter()
    for x in (make_x(), make_x().requires_grad_()):
        y = recompute_block(lambda x: after(mini_sequence_mlp(x, *weights)), x)
        expected = after(gated_mlp(x, *weights))
        tensors = [*after.parameters(), *([x] if x.requires_grad else [])]
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), tensors), torch.autograd.grad(expected.sum(), tensors)
        )


@BOTH
def test_tied_weights(run):
    block = Block()
    block.up.weight = block.gate.weight
    block.before = nn.Linear(HIDDEN, HIDDEN).double()
    block.inside = block.before
    assert_right(run, block, make_x())


@BOTH
@pytest.mark.parametrize("where", ["qkv", "down"])
@pytest.mark.parametrize("parametrization", ["weight_norm", "orthogonal", "spectral_norm"])
def test_parametrizations(run, parametrization, where):
    block = Block()
    getattr(parametrizations, parametrization)(getattr(block, where))
    x = make_x()
    if parametrization == "spectral_norm":  # its power iteration goes on at every use
        with pytest.raises(RuntimeError, match=r"_SpectralNorm\._[uv] .* by the block under"):
            run(block, x.requires_grad_())
        block.eval()
    assert_right(run, block, x.detach())


@BOTH
@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("used_before", [True, False])
def test_cached_parametrizations(run, used_before, backward_inside):
    block = Block()
    parametrizations.orthogonal(block.gate)
    x = make_x().requires_grad_()
    originals = [x, *block.parameters()]
    expected = torch.autograd.grad(plain(block, x).square().sum(), originals)
    with parametrize.cached():
        if used_before:
            _ = block.gate.weight
        y = run(block, x).square().sum()
        if backward_inside:
            actual = torch.autograd.grad(y, originals)
        assert parametrize._cache_enabled == 1
    if not backward_inside:
        actual = torch.autograd.grad(y, originals)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_closed_over_tensors_of_a_block_in_one_piece_get_their_gradients():
    block = Block()
    scale = torch.randn(HIDDEN, dtype=torch.float64, requires_grad=True)
    made, x = scale.exp(), make_x()
    actual = recompute_block(lambda x: block(x * scale) * made, x).sum()
    expected = (plain(block, x * scale) * scale.exp()).sum()
    torch.testing.assert_close(
        torch.autograd.grad(actual, scale), torch.autograd.grad(expected, scale)
    )


# --- random numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["before", "inside", "after"])
def test_dropout_is_drawn_again_in_a_block_in_one_piece(place):
    """And the numbers that come after it, forward or backward, are those of the plain block."""
    block = Block()
    setattr(block, place, nn.Dropout(0.4))
    x = make_x()
    stack = [block, block]

    def through(run):
        return lambda _, x: run(stack[1], run(stack[0], x))

    expected = gradients(through(plain), block, x)
    after_plain = torch.rand(3)
    actual = gradients(through(recompute_block), block, x)
    assert torch.equal(torch.rand(3), after_plain)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", ["before", "inside", "after"])
def test_dropout_in_rows_is_refused(place):
    block = Block()
    setattr(block, place, nn.Dropout(0.4))
    x = make_x()
    with torch.no_grad():
        RUNS["rows"](block, x)
    with pytest.raises(RuntimeError, match=r"drew random numbers.*set dropout to 0"):
        RUNS["rows"](block, x)
    assert_right(RUNS["rows"], block.eval(), x)


# --- changes in place ----------------------------------------------------------------------------


def change(tensor):
    with torch.no_grad():
        tensor.mul_(2)


@BOTH
@pytest.mark.parametrize("name", ["qkv.weight", "qkv.bias", "gate.weight", "shift"])
@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_and_buffers_changed_before_the_backward(run, frozen, name):
    block = Block()
    tensor = block.get_buffer(name) if name == "shift" else block.get_parameter(name)
    tensor.requires_grad_(not frozen and name != "shift")
    loss = run(block, make_x().requires_grad_()).sum()
    change(tensor)
    one_of_many = run is RUNS["one piece"] and tensor.requires_grad
    seen = "a tensor that" if one_of_many else name.split(".")[-1]
    with pytest.raises(RuntimeError, match=rf"{seen} .* was changed in place between"):
        loss.backward()


def callables(block, factor):
    """Ways to call a block with a factor."""

    def both(x, factor):
        return block.forward(x) * factor

    return {
        "argument": lambda x: recompute_block(both, x, factor),
        "in containers": lambda x: recompute_block(
            lambda x, more: both(x, more["factors"][0]), x, {"factors": [factor]}
        ),
        "closed over": lambda x: recompute_block(lambda x: both(x, factor), x),
        "partial": lambda x: recompute_block(partial(both, factor=factor), x),
        "method": lambda x: recompute_block(block.forward, x * factor),
    }


@pytest.mark.parametrize("how", callables(None, None))
@pytest.mark.parametrize("which", ["factor", "weight", "bias"])
def test_whatever_is_called(how, which):
    block, factor = Block(), torch.randn(HIDDEN, dtype=torch.float64)
    if how == "method":
        factor.requires_grad_()
    x = make_x().requires_grad_()
    loss = callables(block, factor)[how](x).sum()
    change({"factor": factor, "weight": block.qkv.weight, "bias": block.qkv.bias}[which])
    with pytest.raises(RuntimeError, match=r"changed in place between|modified by an inplace"):
        loss.backward()


def test_layers_that_are_updated_while_others_wait_for_their_backward():
    """Their methods may belong to the whole model."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(3))

        def layer(self, x, index):
            return self.layers[index](x)

    def step(parameter):
        seen[parameter] = parameter.grad
        change(parameter)

    model, x = Model(), make_x()
    expected = x
    for layer in model.layers:
        expected = plain(layer, expected)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(expected.square().sum(), parameters)
    seen = {}
    for p in parameters:
        p.register_post_accumulate_grad_hook(step)
    y = x
    for index in range(3):
        y = recompute_block(model.layer, y, index)
    y.square().sum().backward()
    torch.testing.assert_close(
        [seen[p] for p in parameters], list(expected), rtol=1e-12, atol=1e-12
    )


GLOBAL = torch.randn(HIDDEN, dtype=torch.float64)


def test_what_autograd_saved_is_seen_wherever_it_is():
    loss = recompute_block(lambda x: (x * GLOBAL[:]).exp(), make_x().requires_grad_()).sum()
    change(GLOBAL)
    with pytest.raises(RuntimeError, match=r"a tensor that autograd saved .* was changed in place"):
        loss.backward()


@BOTH
def test_a_block_that_counts_is_refused_where_it_will_run_again(run):
    class Counting(Block):
        def after_attention(self, x, out, *, values=True):
            self.shift += 1
            return super().after_attention(x, out)

    block, x = Counting(), make_x()
    with torch.no_grad():
        run(block, x)
    with pytest.raises(RuntimeError, match=r"Counting\.shift .* keep state out of the block"):
        run(block, x)


def test_a_row_argument_changed_before_the_backward():
    class Turned(Block):
        def before_attention(self, x, turn, *, queries=True):
            return super().before_attention(x * turn, queries=queries)

    turn = torch.randn(TOKENS // 2, 1, dtype=torch.float64)
    loss = mini_sequence_block(Turned(), CpuKernel(), make_x().requires_grad_(), (turn,)).sum()
    change(turn)
    with pytest.raises(RuntimeError, match=r"a row argument .* was changed in place between"):
        loss.backward()


def test_attentions_result_changed_by_the_block():
    """Which is kept for when the block runs again."""

    class Kernel(CpuKernel):
        def forward(self, *arguments):
            return [tensor.clone() for tensor in super().forward(*arguments)]

    def block(x):
        out = attend(Kernel(), *x.unflatten(-1, (1, -1)).expand(3, -1, -1, -1, -1))
        out.detach().mul_(0.5)
        return out

    with pytest.raises(RuntimeError, match=r"attention's result .* was changed in place by the"):
        recompute_block(block, make_x().requires_grad_())


def test_what_is_saved_and_then_changed_in_the_block_is_refused_as_in_torch():
    def block(x):
        y = x.exp()
        z = y * 2
        with torch.no_grad():
            y.mul_(2)
        return z * y

    x = make_x().requires_grad_()
    for run in (block, partial(recompute_block, block)):
        loss = run(x).sum()
        with pytest.raises(
            RuntimeError, match=r"modified by an inplace|was changed in place after"
        ):
            loss.backward()


def test_a_change_between_two_backwards_through_a_retained_graph():
    block = Block()
    loss = recompute_block(block, make_x().requires_grad_()).sum()
    loss.backward(retain_graph=True)
    change(block.gate.weight)
    with pytest.raises(RuntimeError, match="was changed in place after"):
        loss.backward()


@BOTH
def test_an_optimizer_that_steps_in_the_backward(run):
    """Each weight when its own gradient is there."""
    block, x = Block(), make_x()
    expected = gradients(plain, block, x)
    seen = {}

    def step(name, parameter):
        seen[name] = parameter.grad
        parameter.grad = None
        change(parameter)

    for name, parameter in block.named_parameters():
        parameter.register_post_accumulate_grad_hook(partial(step, name))
    run(block, x.clone().requires_grad_()).square().sum().backward()
    del expected["x"]
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)


# --- inference -----------------------------------------------------------------------------------


@BOTH
def test_a_block_made_for_inference(run):
    """Its tensors have no version counters."""
    with torch.inference_mode():
        block, x = Block(), make_x()
        expected = plain(block, x)
        torch.testing.assert_close(run(block, x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(run(block, x), expected, rtol=1e-12, atol=1e-12)
    block.requires_grad_(False)
    torch.testing.assert_close(run(block, x.clone()), expected, rtol=1e-12, atol=1e-12)
