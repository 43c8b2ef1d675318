"""The whole block in mini-sequences: the same numbers, and only the work and memory it promises."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mst_train.attention.select import CpuKernel, ReferenceKernel
from mst_train.memory.tracker import MemoryTracker
from mst_train.mst import (
    ATTENTION,
    KEYS,
    MLP,
    OUTPUT,
    PIECES,
    QUERIES,
    Documents,
    Offload,
    gated_mlp,
    linear,
    mini_sequence_block,
    mini_sequence_mlp,
)
from mst_train.mst.chunking import BLOCK_BYTES

CPU = torch.device("cpu")
HIDDEN, HEADS, KV_HEADS, INTERMEDIATE = 16, 4, 2, 40
SEQUENCE = 17
CHUNKS = {"of one row": 1, "ragged": 7, "one": SEQUENCE, "longer than the sequence": 1000}
OFFLOADS = {"none": None, "host": Offload(CPU)}
KEEPS = [(), (ATTENTION,), PIECES]


class Block(nn.Module):
    """A pre-norm block; with ``post_norm`` something reads the MLP's result (as in Gemma-2).

    Its row argument is a factor of the keys, [..., S, head size].
    """

    def __init__(self, post_norm=False, kv_heads=KV_HEADS, hidden=HIDDEN):
        super().__init__()
        self.head_size = hidden // HEADS
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.post_norm = nn.LayerNorm(hidden) if post_norm else None
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key_value = nn.Linear(hidden, 2 * kv_heads * self.head_size)
        self.output = nn.Linear(hidden, hidden, bias=False)
        self.gate_up = nn.Parameter(torch.randn(2, INTERMEDIATE, hidden) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(hidden, INTERMEDIATE) / INTERMEDIATE**0.5)
        self.mlp = partial(mini_sequence_mlp, chunk_tokens=5)

    def before_attention(self, x, *factor, queries=True):
        normed = self.attention_norm(x)
        keys_values = linear(self.key_value, normed, KEYS)
        k, v = keys_values.unflatten(-1, (2, -1, self.head_size)).unbind(2)
        for one in factor:
            k = k * one.unsqueeze(-2)
        q = linear(self.query, normed, QUERIES) if queries else None
        return None if q is None else q.unflatten(-1, (-1, self.head_size)), k, v

    def after_attention(self, x, out, *, values=True):
        x = x + linear(self.output, out.flatten(2), OUTPUT)
        if self.post_norm is None:
            return x, self.run_mlp(x, values=values)
        return x, self.post_norm(self.run_mlp(x))

    def run_mlp(self, x, **options):
        return self.mlp(self.mlp_norm(x), *self.gate_up, self.down, **options)


def plain(block, x, arguments=(), documents=None):
    """The block as one piece, by torch's own operations."""
    q, k, v = (t.transpose(1, 2) for t in block.before_attention(x, *arguments))
    batch, sequence = x.shape[:2]
    cu_seqlens = [i * sequence for i in range(batch + 1)]
    cu_seqlens = documents.cu_seqlens.tolist() if documents else cu_seqlens
    owners = torch.tensor([i for i, (a, b) in enumerate(pairwise(cu_seqlens)) for _ in range(a, b)])
    owners = owners.view(batch, 1, sequence)
    seen = (owners[..., None] == owners[..., None, :]).tril()
    out = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    block.mlp, mini_sequence = lambda *tensors, values=True: gated_mlp(*tensors), block.mlp
    stream, branch = block.after_attention(x, out.transpose(1, 2))
    block.mlp = mini_sequence
    return stream + branch


def mini(chunk_tokens="auto", kernel=None, **options):
    """``mini_sequence_block`` with these options, called as ``plain`` is."""

    def run(block, x, arguments=(), documents=None):
        return mini_sequence_block(
            block,
            kernel or CpuKernel(),
            x,
            arguments,
            documents=documents,
            chunk_tokens=chunk_tokens,
            **options,
        )

    return run


def make_stack(
    layers=2, batch=1, dtype=torch.float64, sequence=SEQUENCE, hidden=HIDDEN, seed=0, **options
):
    torch.manual_seed(seed)
    stack = nn.ModuleList(Block(hidden=hidden, **options) for _ in range(layers)).to(dtype)
    return stack, torch.randn(batch, sequence, hidden, dtype=dtype)


def make_documents(cu_seqlens):
    return cu_seqlens and Documents(torch.tensor(cu_seqlens, dtype=torch.int32))


def forward(stack, x, run, *arguments):
    for block in stack:
        x = run(block, x, *arguments)
    return x


def gradients(stack, x, run, *arguments):
    """The result, and the gradients of x and of all parameters."""
    x = x.clone().requires_grad_()
    stack.zero_grad()
    y = forward(stack, x, run, *arguments)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in stack.parameters())]


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kernel", [CpuKernel, ReferenceKernel])
def test_equals_the_plain_block(kernel, keep, offload, chunks, batch):
    stack, x = make_stack(batch=batch)
    run = mini(
        CHUNKS[chunks] * batch,
        kernel(),
        keep=keep,
        offload=OFFLOADS[offload],
    )
    assert_equal(gradients(stack, x, run), gradients(stack, x, plain))


@pytest.mark.parametrize("chunk_tokens", [5, 2 * SEQUENCE])
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
def test_grouped_heads_and_norms_after(kv_heads, post_norm, chunk_tokens):
    stack, x = make_stack(batch=2, kv_heads=kv_heads, post_norm=post_norm)
    assert_equal(gradients(stack, x, mini(chunk_tokens)), gradients(stack, x, plain))


@pytest.mark.parametrize(
    "cu_seqlens",
    [
        [0, 20, 40],
        [0, 5, 10, 15, 20, 40],  # the chunks' own borders
        [0, 2, 18, 20, 21, 39, 40],  # across several chunks
        [0, 4, 5, 6, 10, 11, 20, 29, 36, 40],
        [*range(21), 33, 34, 35, 36, 37, 40],  # of one token
    ],
)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kernel", [CpuKernel, ReferenceKernel])
def test_packed_documents(kernel, keep, cu_seqlens):
    """In chunks of 5 rows of 20; the second row's documents are others than the first's."""
    stack, x = make_stack(batch=2, sequence=20)
    documents = make_documents(cu_seqlens)
    run = mini(10, kernel(), keep=keep)
    actual = gradients(stack, x, run, (), documents)
    assert_equal(actual, gradients(stack, x, plain, (), documents))


@pytest.mark.parametrize("shape", [(SEQUENCE,), (2, SEQUENCE)])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_row_arguments_are_cut_with_the_rows(shape, offload):
    stack, x = make_stack(batch=2)
    factor = torch.randn(*shape, HIDDEN // HEADS, dtype=torch.float64)
    actual = gradients(stack, x, mini(10, offload=OFFLOADS[offload]), (factor,))
    assert_equal(actual, gradients(stack, x, plain, (factor,)))


def test_any_strides():
    """Of x, of the result's gradient, and a gradient that is one number for all."""
    stack, x = make_stack(layers=1, batch=3)
    x = x.permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_()
    assert not x.is_contiguous()
    weights = torch.randn(HIDDEN, 3, SEQUENCE, dtype=torch.float64)
    for loss in (torch.Tensor.sum, lambda y: (y.permute(2, 0, 1) * weights).sum()):
        expected = torch.autograd.grad(loss(plain(stack[0], x)), x)
        assert_equal(torch.autograd.grad(loss(mini(9)(stack[0], x)), x), expected)


@pytest.mark.parametrize("chunk_tokens", [7, SEQUENCE])
def test_frozen_parameters(chunk_tokens):
    stack, x = make_stack(layers=3)
    for p in (stack[0].key_value.weight, stack[1].down, stack[2].gate_up, stack[2].mlp_norm.bias):
        p.requires_grad_(False)
    assert_equal(gradients(stack, x, mini(chunk_tokens)), gradients(stack, x, plain))
    stack.requires_grad_(False)
    actual = gradients(stack, x, mini(chunk_tokens))
    assert_equal(actual, gradients(stack, x, plain))
    assert actual[1] is not None


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_input_without_gradient(offload):
    stack, x = make_stack()
    expected = torch.autograd.grad(forward(stack, x, plain).sum(), list(stack.parameters()))
    y = forward(stack, x, mini(7, offload=OFFLOADS[offload]))
    assert_equal(torch.autograd.grad(y.sum(), list(stack.parameters())), expected)


def test_gradients_of_chosen_tensors():
    """torch.autograd.grad, as a user or a test asks for some gradients only."""
    stack, x = make_stack(layers=3)
    weights = [stack[0].output.weight, stack[2].down, stack[1].attention_norm.bias]
    expected = torch.autograd.grad(forward(stack, x, plain).sum(), weights)
    assert_equal(torch.autograd.grad(forward(stack, x, mini(7)).sum(), weights), expected)


def test_a_parameter_in_two_places():
    """Twice in one block, and a block twice in the model."""
    stack, x = make_stack()
    stack[0].mlp_norm.weight = stack[0].attention_norm.weight
    stack[0].output.weight = stack[0].query.weight
    stack = nn.ModuleList([stack[0], stack[1], stack[0]])
    assert_equal(gradients(stack, x, mini(7)), gradients(stack, x, plain))
    assert_equal(gradients(stack, x, mini()), gradients(stack, x, plain))


class TwoMLPs(Block):
    """The first one's result is read by the second."""

    def after_attention(self, x, out, *, values=True):
        stream = torch.add(*super().after_attention(x, out))
        return stream, self.run_mlp(stream, values=values)


@pytest.mark.parametrize("chunk_tokens", [7, SEQUENCE])
def test_two_mlps(chunk_tokens):
    _, x = make_stack()
    stack = nn.ModuleList(TwoMLPs() for _ in range(2)).double()
    assert_equal(gradients(stack, x, mini(chunk_tokens)), gradients(stack, x, plain))


class Parameter4bit(nn.Parameter):
    """As a quantized weight: it knows more than its numbers."""


def test_frozen_parameters_stay_the_objects_that_they_are():
    stack, x = make_stack(layers=1)
    frozen = Parameter4bit(stack[0].output.weight.detach(), requires_grad=False)
    frozen.state, seen = "quantized", []
    stack[0].output.weight = frozen
    stack[0].output.register_forward_hook(lambda module, *_: seen.append(module.weight))
    gradients(stack, x, mini(7))
    assert len(seen) == 2 * 3
    assert all(weight is frozen for weight in seen)


def test_views_in_the_places_of_parameters():
    """As FSDP puts them there: of one flat tensor, and other views of it in the backward."""
    stack, x = make_stack(layers=1)
    of_x, *others = gradients(stack, x, plain)[1:]
    names = [name.removesuffix(".weight") for name, _ in stack[0].named_parameters()]
    expected = dict(zip(names, others, strict=True))
    weights = [stack[0].query, stack[0].output]
    flat = torch.cat([module.weight.detach().flatten() for module in weights]).requires_grad_()

    def put_views():
        for module, view in zip(weights, flat.view(2, HIDDEN, HIDDEN).unbind(), strict=True):
            vars(module)["weight"] = view

    for module in weights:
        del module.weight
    put_views()
    y = mini(7)(stack[0], x.requires_grad_())
    put_views()
    y.square().sum().backward()
    assert_equal(x.grad, of_x)
    assert_equal(flat.grad, torch.stack([expected["query"], expected["output"]]).flatten())


class Adapted(Block):
    """Reads tensors that are no parameters of its modules."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        self.others = [torch.randn(HIDDEN, dtype=torch.float64, requires_grad=True)]

    def before_attention(self, x, *factor, queries=True):
        scale = self.others[0] if self.where == "before" else 1
        return super().before_attention(x * scale, *factor, queries=queries)

    def after_attention(self, x, out, *, values=True):
        stream, branch = super().after_attention(x, out, values=values)
        return {
            "before": lambda: stream,
            "after": lambda: stream * self.others[0],
            "made from it": lambda: stream * self.others[0].exp(),
            "the stream itself": lambda: self.others[0].expand_as(stream),
        }[self.where](), branch


@pytest.mark.parametrize("where", ["before", "after", "made from it", "the stream itself"])
def test_a_tensor_that_could_get_no_gradient_is_refused(where):
    block = Adapted(where).double()
    x = torch.randn(1, SEQUENCE, HIDDEN, dtype=torch.float64)
    y = mini(7)(block, x)
    with pytest.raises(
        RuntimeError, match=r"a tensor \(16,\) that wants a gradient and is no param"
    ):
        y.sum().backward()
    block.others[0].requires_grad_(False)
    stack = nn.ModuleList([block])
    assert_equal(gradients(stack, x, mini(7)), gradients(stack, x, plain))


class Gated(Block):
    """A stream that is made from the MLP's result, of which autograd knows nothing."""

    def after_attention(self, x, out, *, values=True):
        stream, branch = super().after_attention(x, out, values=values or not self.careless)
        return stream * torch.sigmoid(branch.detach().mean(-1, keepdim=True)), branch


@pytest.mark.parametrize("chunk_tokens", [7, SEQUENCE])
def test_a_result_that_is_read(chunk_tokens):
    _, x = make_stack()
    stack = nn.ModuleList([Gated()]).double()
    stack[0].careless = False
    assert_equal(gradients(stack, x, mini(chunk_tokens)), gradients(stack, x, plain))
    stack[0].careless = True
    with pytest.raises(RuntimeError, match=r"reads the result of .*values=False"):
        gradients(stack, x, mini(chunk_tokens))


class WithoutGraph(Block):
    """Parts of it depend on nothing that wants a gradient."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def before_attention(self, x, *factor, queries=True):
        q, k, v = super().before_attention(x, *factor, queries=queries)
        return (q, k.detach(), v.detach()) if self.part == "keys" else (q, k, v)

    def after_attention(self, x, out, *, values=True):
        out = out.detach() if self.part == "attention" else out
        stream, branch = super().after_attention(x, out)
        return {"stream": (stream.detach(), branch), "branch": (stream, branch.detach())}.get(
            self.part, (stream, branch)
        )


@pytest.mark.parametrize("part", ["keys", "attention", "stream", "branch"])
@pytest.mark.parametrize("chunk_tokens", [7, SEQUENCE])
def test_detached_parts(chunk_tokens, part):
    _, x = make_stack()
    stack = nn.ModuleList([WithoutGraph(part)]).double()
    for actual, expected in zip(
        gradients(stack, x, mini(chunk_tokens)), gradients(stack, x, plain), strict=True
    ):
        if expected is None:
            assert actual is None or not actual.any()
        else:
            assert_equal(actual, expected)


@pytest.mark.parametrize("chunk_tokens", [4, SEQUENCE])
def test_hooks_see_each_gradient_once_and_whole(chunk_tokens):
    """As data-parallel and sharding code rely on."""
    stack, x = make_stack()
    expected = gradients(stack, x, plain)[2:]
    seen, accumulated = [], []
    for p in stack.parameters():
        p.register_hook(lambda gradient, p=p: seen.append((p, gradient.clone())))
        p.register_post_accumulate_grad_hook(lambda p: accumulated.append((p, p.grad.clone())))
    gradients(stack, x, mini(chunk_tokens))
    for calls in (seen, accumulated):
        assert len(calls) == len(expected)
        by_parameter = dict(calls)
        assert_equal([by_parameter[p] for p in stack.parameters()], expected)


def test_under_recomputation_of_torch():
    stack, x = make_stack()
    run = partial(checkpoint, mini(7), use_reentrant=False)
    assert_equal(gradients(stack, x, run), gradients(stack, x, plain))


def test_inside_a_compiled_function():
    stack, x = make_stack(layers=1)
    compiled = torch.compile(lambda y: mini(7)(stack[0], y), backend="aot_eager")
    actual = gradients(stack, x, lambda block, y: compiled(y))
    assert_equal(actual, gradients(stack, x, plain))


def test_bf16_weight_gradients_are_as_near_to_the_truth_as_in_one_chunk():
    """Summed over 128 chunks in fp32: in bf16, each would cost up to 2^-9 of all before it, which
    makes the weights' errors 2 to 4 times those in one chunk. Over several draws, since the error
    of a sum that nearly cancels (a key's bias has no gradient) is one draw's luck. The factor
    leaves room for each chunk's gradient being rounded to bf16 once."""

    def squared_errors(seed, run):
        stack, x = make_stack(layers=1, sequence=512, dtype=torch.bfloat16, seed=seed)
        truth = copy.deepcopy(stack).double()
        expected = gradients(truth, x.double(), plain)
        actual = gradients(stack, x, run)
        return torch.stack(
            [
                (a.double() - e).square().sum() / e.square().sum()
                for a, e in zip(actual, expected, strict=True)
            ]
        )

    many, one = (sum(squared_errors(seed, mini(c)) for seed in range(4)).sqrt() for c in (4, 512))
    names = ["y", "dx", *(name for name, _ in make_stack(layers=1)[0].named_parameters())]
    for name, error, of_one_chunk in zip(names, many.tolist(), one.tolist(), strict=True):
        assert error < 1.5 * of_one_chunk, name


# --- what autograd may do with it ----------------------------------------------------------------


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("chunk_tokens", [7, SEQUENCE])
def test_a_second_backward_through_a_retained_graph(chunk_tokens, keep):
    stack, x = make_stack()
    tensors = [x.requires_grad_(), *stack.parameters()]
    loss = forward(stack, x, mini(chunk_tokens, keep=keep)).square().sum()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("chunk_tokens", [7, SEQUENCE])
def test_a_second_backward_after_offloading_is_refused(chunk_tokens, keep):
    stack, x = make_stack(layers=1)
    run = mini(chunk_tokens, keep=keep, offload=Offload(CPU))
    loss = forward(stack, x.requires_grad_(), run).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward through mini_sequence_block"):
        loss.backward()


def test_gradients_of_gradients_are_refused():
    stack, x = make_stack(layers=1)
    y = mini(7)(stack[0], x.requires_grad_())
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_an_input_changed_in_place_is_refused():
    stack, x = make_stack(layers=1)
    h = x.requires_grad_() * 1
    y = mini(7)(stack[0], h)
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("part", ["before_attention", "after_attention"])
@pytest.mark.parametrize("chunk_tokens", [7, SEQUENCE])
def test_an_exception_in_the_re_run_leaves_the_block_as_it_was(monkeypatch, part, chunk_tokens):
    stack, x = make_stack(layers=1)
    parameters = list(stack.named_parameters())
    original = getattr(stack[0], part)

    def failing(*arguments, **options):
        if torch.is_grad_enabled():
            raise KeyError("user's own")
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(stack[0], part, failing)
        loss = mini(chunk_tokens)(stack[0], x.clone().requires_grad_()).sum()
        with pytest.raises(KeyError, match="user's own"):
            loss.backward()
    now = list(stack.named_parameters())
    assert [name for name, _ in now] == [name for name, _ in parameters]
    assert all(a is b for (_, a), (_, b) in zip(now, parameters, strict=True))
    assert_equal(gradients(stack, x, mini(chunk_tokens)), gradients(stack, x, plain))


@pytest.mark.parametrize("chunk_tokens", [0, -1, 2.5, True, "many"])
def test_unusable_chunk_sizes(chunk_tokens):
    stack, x = make_stack(layers=1)
    with pytest.raises(ValueError, match="must be a positive integer or 'auto'"):
        mini(chunk_tokens)(stack[0], x)


# --- the work ------------------------------------------------------------------------------------


class CountingKernel(CpuKernel):
    """Calls, and the pairs of queries and keys in them (of all rows and heads alike)."""

    def __init__(self):
        super().__init__()
        self.calls, self.pairs = [0, 0], [0, 0]

    def count(self, which, q, k):
        self.calls[which] += 1
        self.pairs[which] += q.shape[1] * k.shape[1]

    def forward(self, q, k, v, documents=None, causal=True):
        self.count(0, q, k)
        return super().forward(q, k, v, documents, causal)

    def backward(self, dout, q, k, v, out, lse, documents=None, causal=True):
        self.count(1, q, k)
        return super().backward(dout, q, k, v, out, lse, documents, causal)


@pytest.mark.parametrize("chunk_tokens", [1, 7, SEQUENCE])
@pytest.mark.parametrize(("keep", "forwards"), [(PIECES, 1), ((ATTENTION,), 1), ((), 2)])
def test_attention_runs_as_often_as_promised(keep, forwards, chunk_tokens):
    """A square for every chunk, and a rectangle for every chunk but the first."""
    kernel, layers = CountingKernel(), 2
    stack, x = make_stack(layers)
    gradients(stack, x, mini(chunk_tokens, kernel, keep=keep))
    lengths = [min(chunk_tokens, SEQUENCE - start) for start in range(0, SEQUENCE, chunk_tokens)]
    calls = layers * (2 * len(lengths) - 1)
    pairs = layers * sum(length * (i * chunk_tokens + length) for i, length in enumerate(lengths))
    assert kernel.calls == [forwards * calls, calls]
    assert kernel.pairs == [forwards * pairs, pairs]


def test_attention_does_not_look_before_documents():
    """No rectangle where documents end with the chunks."""
    kernel = CountingKernel()
    stack, x = make_stack(layers=1, sequence=20)
    gradients(stack, x, mini(5, kernel), (), make_documents([0, 10, 15, 20]))
    squares, rectangle, of_documents = 4, 1, 4
    assert kernel.calls == [squares + rectangle + of_documents] * 2


class Products(TorchDispatchMode):
    """How often each weight is in a product of all tokens, by the weight's shape.

    Of chunks, the parts add up: a whole number means that all tokens went through as often.
    """

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.counts = tokens, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if function.overloadpacket in (aten.mm, aten.addmm, aten.addmm_):
            (m, k), (_, n) = (matrix.shape for matrix in args[-2:])
            weight = frozenset({HIDDEN, 2 * HIDDEN // HEADS, INTERMEDIATE} & {m, k, n})
            work = m * k * n / self.tokens
            size = max(weight) * min(weight)
            self.counts[weight] = self.counts.get(weight, 0) + work / size
        return function(*args, **(kwargs or {}))


def count_products(chunk_tokens, post_norm=False, **options):
    """Of the square matrices (query and output), of keys with values, and of the MLP's."""
    tokens = 23  # no number of a weight's features
    stack, x = make_stack(layers=1, kv_heads=1, post_norm=post_norm, sequence=tokens)
    with Products(tokens) as products:
        gradients(stack, x, mini(chunk_tokens, **options))
    square, keys, mlp = {HIDDEN}, {HIDDEN, 2 * HIDDEN // HEADS}, {HIDDEN, INTERMEDIATE}
    assert len(products.counts) == 3
    return tuple(products.counts[frozenset(of)] for of in (square, keys, mlp))


@pytest.mark.parametrize("chunk_tokens", [1, 7, 23])
def test_products(chunk_tokens):
    """MLP: 3 forward, 2 to rebuild gate and up, 6 backward. Others: forward, re-run, and two in the
    backward; keys and values once more where there are several chunks and they are not offloaded.
    """
    several = chunk_tokens < 23
    square, keys, mlp = count_products(chunk_tokens)
    assert (square, keys, mlp) == pytest.approx((4 + 4, 5 if several else 4, 11))
    square, keys, mlp = count_products(chunk_tokens, offload=Offload(CPU))
    assert (square, keys, mlp) == pytest.approx((4 + 4, 4, 11))


@pytest.mark.parametrize("chunk_tokens", [1, 7, 23])
@pytest.mark.parametrize("post_norm", [False, True])
def test_products_that_are_kept_are_computed_once(chunk_tokens, post_norm):
    """A norm that reads the MLP's result has it computed again from gate and up."""
    several, down = chunk_tokens < 23, 1 if post_norm else 0
    again = {(QUERIES,): (7, 5, 11), (OUTPUT,): (7, 5, 11), (KEYS,): (8, 3, 11), (MLP,): (8, 5, 9)}
    again[PIECES] = (6, 3, 9)
    for keep, (square, keys, mlp) in again.items():
        found = count_products(chunk_tokens, post_norm, keep=keep)
        keys -= KEYS not in keep and not several
        mlp += down if MLP in keep else 3 * down
        assert found == pytest.approx((square, keys, mlp))


@pytest.mark.parametrize("chunk_tokens", [7, 23])
def test_products_where_a_norm_reads_the_mlp(chunk_tokens):
    """3 more for the MLP's result."""
    square, _, mlp = count_products(chunk_tokens, post_norm=True)
    assert (square, mlp) == pytest.approx((4 + 4, 14))


def test_automatic_chunks_are_bounded_by_bytes(monkeypatch):
    """The results of all products, with their gradients: of query, key and value, output, MLP."""
    stack, x = make_stack(layers=1, batch=2, sequence=3072)
    features = HIDDEN + 2 * KV_HEADS * HIDDEN // HEADS + HIDDEN + 2 * INTERMEDIATE + HIDDEN
    chunks = []
    for tokens in (2048, 3072, 6143, 6144):
        kernel = CountingKernel()
        monkeypatch.setitem(BLOCK_BYTES, "cpu", tokens * 2 * features * x.element_size())
        with torch.no_grad():
            mini("auto", kernel)(stack[0], x)
        chunks.append((kernel.calls[0] + 1) / 2)
    assert chunks == [3, 2, 2, 1]


# --- the memory ----------------------------------------------------------------------------------


def kept_bytes(x, keep):
    """Of one block, between forward and backward."""
    log_sum_exp = x.shape[0] * x.shape[1] * HEADS * max(x.element_size(), 4)
    sizes = {
        ATTENTION: x.nbytes + log_sum_exp,
        KEYS: 2 * x.nbytes * KV_HEADS // HEADS,
        QUERIES: x.nbytes,
        OUTPUT: x.nbytes,
        MLP: 2 * x.nbytes * INTERMEDIATE // x.shape[-1],
    }
    return x.nbytes + sum(sizes[name] for name in keep)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [4, pytest.param(14, marks=pytest.mark.slow), 34])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 17, 34]])
def test_memory_between_forward_and_backward(cu_seqlens, chunk_tokens, dtype):
    """To the byte, with everything that views hold on to. The first input was there before, and
    the last result is alive."""
    layers = 2
    stack, x = make_stack(layers, batch=2, dtype=dtype)
    documents = make_documents(cu_seqlens)
    keys_values = 2 * x.nbytes * KV_HEADS // HEADS if chunk_tokens < 34 else 0
    for keep in (*KEEPS, *((name,) for name in PIECES)):
        kept = kept_bytes(x, keep)
        with MemoryTracker() as tracker:
            run = mini(chunk_tokens, keep=keep)
            y = forward(stack, x, run, (), documents)
            assert tracker.live_bytes == layers * kept - x.nbytes + y.nbytes
            y.sum().backward()

        offload = Offload(CPU)
        run = mini(chunk_tokens, keep=keep, offload=offload)
        forward(stack, x, run, (), documents)  # makes the host buffers
        with MemoryTracker() as tracker:
            y = forward(stack, x, run, (), documents)
            assert tracker.live_bytes == y.nbytes
            y.sum().backward()
        assert offload.host_bytes == layers * (kept + keys_values)


def test_without_gradients_nothing_is_kept():
    stack, x = make_stack()
    offload = Offload(CPU)
    for run in (mini(7), mini(7, offload=offload), mini()):
        with torch.no_grad(), MemoryTracker() as tracker:
            y = forward(stack, x, run)
            assert tracker.live_bytes == y.nbytes
        assert not y.requires_grad
        assert_equal(y, forward(stack, x, plain))
    stack.requires_grad_(False)
    with MemoryTracker() as tracker:
        y = forward(stack, x, mini(7, offload=offload))
        assert tracker.live_bytes == y.nbytes
    assert offload.host_bytes == 0


def backward_peak(layers, sequence, *, keep=(ATTENTION,), offload=False, post_norm=False):
    """Beyond what was kept, in bf16, in chunks of 64 rows."""
    stack, x = make_stack(
        layers, sequence=sequence, dtype=torch.bfloat16, hidden=64, post_norm=post_norm
    )
    for p in stack.parameters():
        p.grad = torch.zeros_like(p)
    run = mini(64, keep=keep, offload=Offload(CPU) if offload else None)
    loss = forward(stack, x, run).square().sum()
    with MemoryTracker() as tracker:
        loss.backward()
    return tracker.peak_bytes


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("keep", KEEPS)
def test_peak_of_the_backward_does_not_grow_with_depth(monkeypatch, keep, offload):
    monkeypatch.setattr(CpuKernel, "keys_at_once", 128)
    shallow, deep = (backward_peak(layers, 256, keep=keep, offload=offload) for layers in (2, 4))
    assert deep == shallow


@pytest.mark.parametrize("post_norm", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("offload", [False, True])
def test_peak_of_the_backward_per_token(monkeypatch, offload, keep, post_norm):
    """Beyond what was kept, the whole sequence's

        keys and values            2 x 2 heads of 16 in bf16      128
        their gradients            the same in fp32               256
        gradients of y and x       2 x 64 in bf16                 256

    and with offload the keys and values of the block before, on their way back.
    """
    monkeypatch.setattr(CpuKernel, "keys_at_once", 128)
    options = {"keep": keep, "offload": offload, "post_norm": post_norm}
    peaks = [backward_peak(2, sequence, **options) for sequence in (384, 512, 640)]
    expected = 128 + 256 + 256 + (128 if offload else 0)
    slopes = [(b - a) / 128 for a, b in pairwise(peaks)]
    assert slopes == [expected] * 2


def test_peak_of_the_forward_per_token(monkeypatch):
    """The result, keys and values (128 + 128); what it keeps is 272, without x itself."""
    monkeypatch.setattr(CpuKernel, "keys_at_once", 128)
    peaks = []
    for sequence in (512, 768, 1024):
        stack, x = make_stack(1, sequence=sequence, dtype=torch.bfloat16, hidden=64)
        with MemoryTracker() as tracker:
            forward(stack, x, mini(64))
        peaks.append(tracker.peak_bytes)
    kept = kept_bytes(x, (ATTENTION,)) - x.nbytes
    expected = 128 + 128 + kept / 1024
    slopes = [(b - a) / 256 for a, b in pairwise(peaks)]
    assert slopes == [expected] * 2


@pytest.mark.parametrize("offload", [False, True])
def test_nothing_leaks_over_many_steps(offload):
    offload = Offload(CPU) if offload else None
    stack, x = make_stack()

    def step():
        gradients(stack, x, mini(7, offload=offload))
        stack.zero_grad()

    step()
    host = offload and offload.host_bytes
    with MemoryTracker() as tracker:
        for _ in range(20):
            step()
            assert tracker.live_bytes == 0
    assert (offload and offload.host_bytes) == host


def test_an_abandoned_graph_gives_its_buffers_back():
    offload = Offload(CPU)
    stack, x = make_stack()
    sizes = set()
    for _ in range(3):
        y = forward(stack, x, mini(7, offload=offload))
        sizes.add(offload.host_bytes)
        del y
    assert len(sizes) == 1


def test_what_it_cannot_use_is_named():
    x = torch.randn(1, SEQUENCE, HIDDEN)
    with pytest.raises(TypeError, match="Linear has no before_attention: mini_sequence_block"):
        mini_sequence_block(nn.Linear(HIDDEN, HIDDEN), CpuKernel(), x)
    with pytest.raises(TypeError, match=r"is no AttentionKernel: mst_train\.attention\.at"):
        mini_sequence_block(Block(), F.scaled_dot_product_attention, x)
    with pytest.raises(ValueError, match=r"x \(17, 16\) is not \[B, S, D\]"):
        mini_sequence_block(Block(), CpuKernel(), x[0])

    class HeadsFirst(Block):
        def before_attention(self, *arguments, **settings):
            parts = super().before_attention(*arguments, **settings)
            return tuple(None if part is None else part.transpose(1, 2) for part in parts)

    factor = torch.ones(SEQUENCE, HIDDEN // HEADS)
    with pytest.raises(ValueError, match=r"gave keys \(1, 2, 17, 4\) for x \(1, 17, 16\)"):
        mini_sequence_block(HeadsFirst(), CpuKernel(), x, (factor,))
