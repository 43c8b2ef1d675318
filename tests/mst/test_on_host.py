"""Hidden states and gradients that wait on the host between blocks: the same numbers for everyone
who reads them, and no memory on the device for the sequence."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from mst_train.attention import select_attention
from mst_train.attention.select import CpuKernel
from mst_train.config import ModelConfig
from mst_train.memory.tracker import MemoryTracker
from mst_train.model import Policy, build_model
from mst_train.mst import HostBudgetError, Offload, OnHost, rowwise
from mst_train.mst.on_host import new_rows, rows_of

CPU = torch.device("cpu")
SEQUENCE = 17
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
}
CHUNKS = [slice(0, 4), slice(4, 8), slice(8, 9)]


def decoder(policy, offload=None, dtype=torch.float64, **settings):
    config = ModelConfig(**(SMALL | settings))
    attention = select_attention("auto", CPU, dtype)
    model = build_model(config, policy=policy, attention=attention, dtype=dtype)
    model.offload = offload
    return model


def in_chunks(chunk_tokens=10, **keep):
    return Policy(True, True, 4, 5, block_chunk_tokens=chunk_tokens, keep=keep)


def batch(rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SMALL["vocab_size"], (2, rows, SEQUENCE), generator=generator)


def gradients(model, *batches):
    for tokens, labels in batches:
        loss, _ = model(tokens, labels)
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a + 0, b, rtol=1e-12, atol=1e-12)


def on_host(values):
    rows = new_rows(values, CHUNKS, Offload(CPU))
    for index, chunk in enumerate(CHUNKS):
        rows.write(index, values[:, chunk].clone())
    return rows.tensor


# --- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("keep", [{}, {"attention": "all"}, {"attention": 1, "mlp": 2}])
@pytest.mark.parametrize(
    "settings",
    [{}, {"norm_placement": "around", "norm_offset": True}, {"num_experts": 4}],
    ids=str,
)
def test_a_decoder(settings, keep, rows):
    """Over two micro-batches, at chunks that do not divide the sequence."""
    batches = batch(rows), batch(rows, 1)
    model = decoder(in_chunks(5 * rows, **keep), Offload(CPU), **settings)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, inputs, y: seen.append(type(y)))
    found = gradients(model, *batches)
    assert seen == [OnHost] * 6
    assert_equal(found, gradients(decoder(Policy(), **settings), *batches))


def test_where_there_is_nothing_to_gain_results_are_plain():
    seen = []
    for policy, offload in ((in_chunks(1000), Offload(CPU)), (in_chunks(), None)):
        model = decoder(policy, offload)
        model.blocks[1].register_forward_hook(lambda _, inputs, y: seen.append(type(y)))
        model(*batch())
    with torch.no_grad():
        model.offload = Offload(CPU)
        model(*batch())
    assert seen == [torch.Tensor] * 3
    assert model.offload.host_bytes == 0


def held(model):
    """What hooks and others get to hold of the blocks, while and after a step runs."""
    found, results = [], []

    def forward_done(block, inputs, y):
        y.register_hook(found.append)
        y.retain_grad()
        results.append(y)

    for block in model.blocks:
        block.register_full_backward_hook(lambda _, dx, dy: found.extend([dx[0], dy[0]]))
        block.register_forward_hook(forward_done)
    step = gradients(model, batch())
    return step + results + [y.grad for y in results] + found


def test_who_holds_a_gradient_keeps_its_values():
    """To the end of the step and beyond, when blocks have long written what comes after it."""
    found = held(decoder(in_chunks(), Offload(CPU)))
    assert sum(isinstance(tensor, OnHost) for tensor in found) > 6
    assert_equal(found, held(decoder(Policy())))


def without_some(gradient):
    gradient[:, 2:3].zero_()


@pytest.mark.parametrize("hook", [lambda g: g * 2, lambda g: g.mul_(3), without_some])
def test_a_hook_that_changes_a_gradient(hook):
    def found(model):
        def after(_, inputs, y):
            y.register_hook(hook)

        for block in model.blocks:
            block.register_forward_hook(after)
        return gradients(model, batch())

    assert_equal(found(decoder(in_chunks(), Offload(CPU))), found(decoder(Policy())))


def test_gradients_of_hidden_states_and_of_two_readers():
    def found(model):
        states = []
        for block in model.blocks:
            block.register_forward_hook(lambda _, inputs, y: states.append(y))
        loss, _ = model(*batch())
        loss = loss + sum((y[:, 3:] ** 2).sum() + y.sin().sum() for y in states)
        return torch.autograd.grad(loss, [*states, *model.parameters()])

    assert_equal(found(decoder(in_chunks(), Offload(CPU))), found(decoder(Policy())))


@pytest.mark.parametrize("change", ["whole", "a view", "replaced"])
def test_results_changed_in_place(change):
    def found(model):
        def after(_, inputs, y):
            if change == "whole":
                y.mul_(1.5)
            elif change == "a view":
                y[:, 4:6] += 1
            else:
                return y.clone()

        model.blocks[0].register_forward_hook(after)
        return gradients(model, batch())

    assert_equal(found(decoder(in_chunks(), Offload(CPU))), found(decoder(Policy())))


def test_a_block_that_keeps_its_input_on_the_device():
    """It reads what the one before has sent to the host."""
    expected = gradients(decoder(Policy()), batch())
    model = decoder(in_chunks(), Offload(CPU))
    block = model.blocks[1]
    forward = block.forward
    block.forward = lambda x, cos, sin, documents, offload: forward(x, cos, sin, documents)
    assert_equal(gradients(model, batch()), expected)


@pytest.mark.parametrize("frozen", ["embedding", "blocks.1", "norm"])
def test_frozen_parts(frozen):
    def found(model):
        model.get_submodule(frozen).requires_grad_(False)
        loss, _ = model(*batch())
        wanted = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(loss, wanted)

    assert_equal(found(decoder(in_chunks(), Offload(CPU))), found(decoder(Policy())))


@pytest.mark.parametrize("module", [nn.LayerNorm(6), nn.Linear(6, 3), nn.Tanh()], ids=str)
def test_rowwise(module):
    module = module.double()
    values = torch.randn(2, 9, 6, dtype=torch.float64)
    inputs = [on_host(values).requires_grad_(), values.clone().requires_grad_()]
    results = [rowwise(module, inputs[0]), module(inputs[1])]
    weights = torch.randn_like(results[1])
    found, expected = (
        [y, *torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])]
        for x, y in zip(inputs, results, strict=True)
    )
    assert isinstance(found[1], OnHost)
    assert_equal(found, expected)


# --- reading -------------------------------------------------------------------------------------


def test_it_is_read_chunk_by_chunk_in_both_directions_and_again():
    values = torch.randn(2, 9, 6)
    x = on_host(values)
    rows = rows_of(x, CHUNKS)
    for order, step in ([0, 1, 2], 1), ([2, 1, 0], -1), ([1, 1, 0], 1):
        for index in order:
            assert rows.read(index, index + step).equal(values[:, CHUNKS[index]])
    others = [slice(0, 5), slice(5, 9)]
    assert rows_of(x, others).read(1, 2).equal(values[:, 5:])
    assert x.equal(values)


def test_a_view_is_one():
    values = torch.randn(2, 9, 6)
    x = on_host(values)
    x.detach()[:, 2:5].zero_()
    x.view(-1)[0] = 7
    values[:, 2:5] = 0
    values[0, 0, 0] = 7
    assert x.equal(values)
    assert rows_of(x, CHUNKS).read(0, 1).equal(values[:, CHUNKS[0]])


# --- memory --------------------------------------------------------------------------------------


def test_what_it_takes_to_read_all_values_is_counted():
    """The whole, for as long as it lives, and two chunks of four positions on their way to it."""
    x = on_host(torch.randn(2, 9, 6))
    with MemoryTracker() as tracker:
        x.sum()
        assert tracker.live_bytes == 9 * 2 * 6 * 4
        assert tracker.peak_bytes == (9 + 4 + 4) * 2 * 6 * 4


def test_buffers_are_used_again_and_bounded():
    model = decoder(in_chunks(), Offload(CPU))
    sizes = set()
    for _ in range(3):
        gradients(model, batch())
        sizes.add(model.offload.host_bytes)
    [size] = sizes
    model.offload = Offload(CPU, size)
    gradients(model, batch())
    model.offload = Offload(CPU, size - 1)
    with pytest.raises(HostBudgetError):
        gradients(model, batch())


def peaks(tokens):
    """Of forward and backward, in bf16 and chunks of 64, without the head's; and on the host."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    model = decoder(in_chunks(64, attention="all"), Offload(CPU), torch.bfloat16, **sizes)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.zeros(1, tokens, 64, dtype=torch.bfloat16)
    cos, sin = torch.zeros(2, tokens, 8)
    tracker = MemoryTracker()
    for _ in range(2):  # the first makes the host buffers
        with tracker:
            y = x
            tracker.reset_peak()
            for block in model.blocks:
                y = block(y, cos, sin, None, model.offload)
            before, live = tracker.peak_bytes, tracker.live_bytes
            gradient = on_host_like(y, model.offload)
            tracker.reset_peak()
            y.backward(gradient)
            after = tracker.peak_bytes
            del y, gradient
        assert live == 0
    return before, after, model.offload.host_bytes


def on_host_like(y, offload):
    rows = new_rows(y, y.pieces.chunks, offload)
    for index, chunk in enumerate(y.pieces.chunks):
        rows.write(index, torch.zeros(1, chunk.stop - chunk.start, 64, dtype=y.dtype))
    return rows.tensor


def test_bytes_per_token(monkeypatch):
    """On the device, forward: keys and values (2 x 2 heads of 16 in bf16). Backward: the same, and
    once more those of the block before, and their gradients in fp32. On the host: of each block x,
    attention's result and log-sum-exp, keys and values; the last result, and its gradient."""
    monkeypatch.setattr(CpuKernel, "keys_at_once", 64)
    found = [peaks(tokens) for tokens in (512, 640, 768)]
    for one, other in pairwise(found):
        slopes = [(b - a) / 128 for a, b in zip(one, other, strict=True)]
        assert slopes == [128, 2 * 128 + 256, 3 * (2 * 128 + 4 * 4 + 128) + 2 * 128]
