"""The whole decoder block in mini-sequences.

Everything in a block but attention treats each token by itself, so a block is two row-wise pieces
around attention:

    q, k, v        = block.before_attention(x)          norm, projections, rotary embedding
    out            = attention(q, k, v)
    stream, branch = block.after_attention(x, out)      y = stream + branch: residual and MLP

``mini_sequence_block`` goes through the rows in chunks, in the forward and in the backward, and
only keys and values exist for the whole sequence. The backward takes the last rows first: when it
comes to a chunk, everything that reads the chunk's keys and values has been there.

It keeps the block's input and, with ``keep_attention``, attention's result and log-sum-exp. It
computes again what the backward reads and nothing else: an MLP that ends the branch rebuilds its
own intermediates (mst/mlp.py), and nobody needs its result twice; the block is told so.

Legend: B batch, S sequence, T rows of a chunk, D hidden, H query heads, K key-value heads, E head
size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mst_train.mst.attention import AttentionKernel, Documents
from mst_train.mst.attention_rows import attend_rows, attend_rows_backward
from mst_train.mst.autocast import Autocast
from mst_train.mst.autograd import first_order_only
from mst_train.mst.chunking import BLOCK_BYTES, chunk_slices, resolve_chunk_tokens
from mst_train.mst.offload import Offload, Stored
from mst_train.mst.rerun import (
    RandomState,
    Unchanged,
    leaves,
    owner,
    tensors_of,
    uncached_parametrizations,
)


class RowwiseBlock(Protocol):
    """An ``nn.Module`` whose parts treat each token by itself."""

    def before_attention(
        self, x: Tensor, *row_arguments: Tensor, queries: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """[B, T, D] -> q [B, T, H, E], k and v [B, T, K, E]; q is None without ``queries``."""
        ...

    def after_attention(
        self, x: Tensor, out: Tensor, *, values: bool = True
    ) -> tuple[Tensor, Tensor]:
        """[B, T, D], [B, T, H, E] -> two tensors [B, T, D] whose sum is the block's result.

        Without ``values`` they are wanted for their graph, and nobody reads them. The block may
        ignore it, or hand it on to a ``mini_sequence_mlp`` whose result is one of them as it is.
        """
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def modules(self) -> Iterator[nn.Module]: ...


# A compiled graph would trace the nested backward away.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def mini_sequence_block(
    block: RowwiseBlock,
    kernel: AttentionKernel,
    x: Tensor,
    row_arguments: Sequence[Tensor] = (),
    *,
    documents: Documents | None = None,
    chunk_tokens: int | str = "auto",
    keep_attention: bool = True,
    offload: Offload | None = None,
) -> Tensor:
    """A decoder block, computed in chunks of rows in the forward and in the backward.

    Exact: the result and all gradients are those of the block computed as one piece, up to
    rounding, whatever the chunk size; each parameter's gradient reaches autograd once, summed over
    chunks in fp32 at least. The block must do the same when it runs again: no random numbers, no
    state that changes. Changes in place are seen of x, the row arguments, and the parameters and
    buffers of its modules.

    Args:
        block: the row-wise parts, and all parameters that they read.
        kernel: causal attention.
        x: [B, S, D].
        row_arguments: what ``before_attention`` takes beside x, [..., S, features] each: cut into
            rows with it. No gradient reaches them.
        documents: confines attention to each document.
        chunk_tokens: tokens (rows times B) computed at a time; "auto" bounds a chunk's
            intermediates by bytes.
        keep_attention: keep attention's result and log-sum-exp rather than compute them again.
        offload: where what is kept waits; None: on its device.

    Returns:
        [B, S, D].

    Memory: x, and with ``keep_attention`` a tensor of q's size with one more number per head and
    token; none of them on the device with ``offload``, where keys and values wait too. While it
    runs, keys and values, in the backward also their gradients, and the intermediates of one chunk.
    Recomputation: ``before_attention``, and ``after_attention`` without its last MLP; without
    ``keep_attention`` attention's forward; keys and values once more where there are several chunks
    and no offload.

    Raises:
        ValueError: an unusable chunk size.
        RuntimeError: random numbers were drawn, from torch's default generators; a tensor was
            changed in place, by the block or before the backward; a tensor that is no parameter
            would get no gradient; a second backward where the kept tensors were offloaded.
    """
    if x.numel() == 0:
        raise ValueError(f"x {tuple(x.shape)} has no tokens")
    parameters = _Parameters(block)
    needs_backward = torch.is_grad_enabled() and (x.requires_grad or bool(parameters.tensors))
    unchanged = Unchanged("mini_sequence_block")
    random = RandomState(x.device)
    if needs_backward:  # and the block will run again
        for argument in row_arguments:
            unchanged.add("a row argument", argument)
        for name, tensor in tensors_of(block.modules()):
            unchanged.add(name, tensor)
    settings = _Settings(
        block,
        kernel,
        documents,
        _chunk_rows(chunk_tokens, x, block),
        keep_attention,
        offload,
        needs_backward,
        parameters,
        unchanged,
        Autocast.here(x.device),
    )
    with settings.run():
        y: Tensor = _MiniSequenceBlock.apply(  # type: ignore[no-untyped-call]
            settings, len(row_arguments), x, *row_arguments, *parameters.tensors
        )
    unchanged.check_forward()
    if needs_backward and random.moved():
        raise RuntimeError(
            "the block under mini_sequence_block drew random numbers, and would draw others when "
            "it runs again in the backward: set dropout to 0, or take recompute_block, which "
            "draws the same again"
        )
    return y


class _Settings(NamedTuple):
    block: RowwiseBlock
    kernel: AttentionKernel
    documents: Documents | None
    chunk_rows: int
    keep_attention: bool
    offload: Offload | None
    needs_backward: bool
    parameters: "_Parameters"
    unchanged: Unchanged
    autocast: Autocast

    @contextmanager
    def run(self) -> Iterator[None]:
        """The context that the block runs in, in both passes."""
        with self.autocast.restored(), uncached_parametrizations():
            yield

    def before_attention(
        self, x_BTD: Tensor, arguments: Sequence[Tensor], *, queries: bool = True
    ) -> list[Tensor]:
        """The block's, as attention takes it; without ``queries`` keys and values alone."""
        parts = self.block.before_attention(x_BTD, *arguments, queries=queries)
        return [self.autocast.cast(part) for part in parts if part is not None]


class _MiniSequenceBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: _Settings, row_arguments: int, x_BSD: Tensor, *tensors: Tensor
    ) -> Tensor:
        block, kernel, documents, chunk_rows, keep_attention, offload, needs_backward, *_ = settings
        arguments = tensors[:row_arguments]
        y_BSD = torch.empty_like(x_BSD, memory_format=torch.contiguous_format)
        keys_values = _Rows(x_BSD.shape[1])
        kept: list[Tensor] = []
        stored: list[Stored] = []
        for rows in chunk_slices(x_BSD.shape[1], chunk_rows):
            x_BTD = x_BSD[:, rows]
            q_BTHE, *new = settings.before_attention(x_BTD, _cut(arguments, rows))
            k_BSKE, v_BSKE = keys_values.put(rows, new)
            out, lse = attend_rows(kernel, q_BTHE, k_BSKE, v_BSKE, rows, documents)
            del q_BTHE, new
            attention = [out, lse] if keep_attention and needs_backward else []
            if needs_backward and offload is not None:
                stored.append(offload.store([x_BTD, *attention]))
            else:
                kept += attention
            torch.add(*block.after_attention(x_BTD, out), out=y_BSD[:, rows])
        if needs_backward and offload is None:
            kept.insert(0, x_BSD)
        elif offload is not None and len(stored) > 1:
            stored.append(offload.store(keys_values.tensors))
        ctx.save_for_backward(*arguments, *kept)
        ctx.settings, ctx.row_arguments, ctx.stored = settings, row_arguments, stored
        return y_BSD

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy_BSD: Tensor) -> tuple[Tensor | None, ...]:
        ctx.settings.unchanged.check_backward()
        with ctx.settings.run():
            return _backward(ctx, dy_BSD)


def _backward(ctx: Any, dy_BSD: Tensor) -> tuple[Tensor | None, ...]:
    block, kernel, documents, chunk_rows, *_ = ctx.settings
    saved = ctx.saved_tensors  # once: hooks of others may unpack them
    arguments = saved[: ctx.row_arguments]
    chunks = list(chunk_slices(dy_BSD.shape[1], chunk_rows))
    kept = _Kept(ctx, list(saved[ctx.row_arguments :]), chunks)
    dx_BSD = torch.empty_like(dy_BSD, memory_format=torch.contiguous_format)
    dk_BSKE = dv_BSKE = None
    with ctx.settings.parameters.aliases() as parameters:
        sums = [_Sum(several=len(chunks) > 1) for _ in parameters]
        if len(chunks) > 1:
            k_BSKE, v_BSKE = kept.keys_values(ctx.settings, arguments)
            dk_BSKE, dv_BSKE = _zeros_to_sum(k_BSKE), _zeros_to_sum(v_BSKE)
        for rows in reversed(chunks):
            x_BTD, attention = kept.chunk(rows)
            x_BTD = x_BTD.detach().requires_grad_()
            with torch.enable_grad():
                q_BTHE, k_BTKE, v_BTKE = ctx.settings.before_attention(x_BTD, _cut(arguments, rows))
            if len(chunks) == 1:
                k_BSKE, v_BSKE = k_BTKE.detach(), v_BTKE.detach()
            q_rows = (q_BTHE.detach(), k_BSKE, v_BSKE)
            out, lse = attention or attend_rows(kernel, *q_rows, rows, documents)
            out = out.detach().requires_grad_()
            with torch.enable_grad():
                stream_and_branch = block.after_attention(x_BTD, out, values=False)
            if rows is chunks[-1]:
                results = (q_BTHE, k_BTKE, v_BTKE, *stream_and_branch)
                _refuse_others(results, (x_BTD, out, *parameters))
                del results
            dx_BTD, dout, *gradients = _gradients(
                stream_and_branch, (x_BTD, out, *parameters), (dy_BSD[:, rows],) * 2
            )
            _add(sums, gradients)
            del gradients
            dq, dk, dv = attend_rows_backward(
                kernel,
                _sum_of(out, dout),
                *q_rows,
                out.detach(),
                lse,
                rows,
                documents,
                dk_BSKE,
                dv_BSKE,
            )
            del out, lse, attention, dout, stream_and_branch, q_rows
            more_dx_BTD, *gradients = _gradients(
                (q_BTHE, k_BTKE, v_BTKE), (x_BTD, *parameters), (dq, dk, dv)
            )
            del q_BTHE, k_BTKE, v_BTKE, dq, dk, dv
            _add(sums, gradients)
            dx_BSD[:, rows] = _sum_of(x_BTD, dx_BTD, more_dx_BTD)
            # What the next chunk does not need would be there at its peak.
            del x_BTD, dx_BTD, more_dx_BTD, gradients
    nothing = [None] * (2 + ctx.row_arguments)
    totals = [total.result(p.dtype) for total, p in zip(sums, parameters, strict=True)]
    return (*nothing[:2], dx_BSD, *nothing[2:], *totals)


class _Kept:
    """What a block's forward kept, for its backward, which wants the last rows first."""

    def __init__(self, ctx: Any, kept: list[Tensor], chunks: list[slice]) -> None:
        self._chunks = chunks
        self._offloaded = ctx.settings.offload is not None
        self._x = None if self._offloaded else kept.pop(0)
        self._attention = kept
        self._stored: list[Stored] = ctx.stored
        if self._offloaded and not self._stored:
            raise RuntimeError(
                "a second backward through mini_sequence_block: what it had offloaded came back "
                "in the first. Run the forward again, or leave offload out"
            )

    def keys_values(self, settings: _Settings, arguments: Sequence[Tensor]) -> list[Tensor]:
        """Keys and values of all rows."""
        if self._x is None:
            return self._stored.pop().load()
        keys_values = _Rows(self._x.shape[1])
        for rows in self._chunks:
            new = settings.before_attention(self._x[:, rows], _cut(arguments, rows), queries=False)
            keys_values.put(rows, new)
        return keys_values.tensors

    def chunk(self, rows: slice) -> tuple[Tensor, list[Tensor]]:
        """x of these rows, and attention's result and log-sum-exp if they were kept."""
        if self._x is None:
            x_BTD, *attention = self._stored.pop().load()
            return x_BTD, attention
        attention = self._attention[-2:]
        del self._attention[-2:]
        return self._x[:, rows], attention


class _Rows:
    """Tensors of all rows, put together chunk by chunk; one chunk's alone are as they came."""

    def __init__(self, length: int) -> None:
        self._length = length
        self.tensors: list[Tensor] = []

    def put(self, rows: slice, parts: Sequence[Tensor]) -> list[Tensor]:
        """Put in the parts of these rows; all rows, of which later ones are not there yet."""
        if rows.stop - rows.start == self._length:
            self.tensors = list(parts)
            return self.tensors
        if not self.tensors:
            self.tensors = [
                part.new_empty(part.shape[0], self._length, *part.shape[2:]) for part in parts
            ]
        for tensor, part in zip(self.tensors, parts, strict=True):
            tensor[:, rows] = part
        return self.tensors


class _Sum:
    """A parameter's gradient, summed over chunks in fp32 at least."""

    def __init__(self, *, several: bool) -> None:
        self._several = several
        self._total: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        if self._total is None:
            dtype = _sum_dtype(gradient)
            self._total = gradient.to(dtype, copy=True) if self._several else gradient
        elif self._several:
            self._total += gradient
        else:
            self._total = self._total + gradient

    def result(self, dtype: torch.dtype) -> Tensor | None:
        total, self._total = self._total, None
        return None if total is None else total.to(dtype)


def _add(sums: list[_Sum], gradients: Sequence[Tensor | None]) -> None:
    for total, gradient in zip(sums, gradients, strict=True):
        if gradient is not None:
            total.add(gradient)


class _Parameters:
    """What a block's modules hold that wants gradients: parameters, and views that FSDP puts in
    their places. Others (frozen ones) are nobody's business and stay the objects that they are."""

    def __init__(self, block: RowwiseBlock) -> None:
        places: dict[Tensor, list[tuple[nn.Module, str]]] = {}
        for module in block.modules():
            for name, value in {**module._parameters, **vars(module)}.items():
                # Asked first, as most of what a module has is no tensor.
                wanted = getattr(value, "requires_grad", False) and isinstance(value, Tensor)
                if wanted and (value.is_leaf or value._is_view()):
                    places.setdefault(value, []).append((module, name))
        self.tensors = list(places)
        self._places = list(places.values())

    @contextmanager
    def aliases(self) -> Iterator[list[Tensor]]:
        """The modules with other tensors on the same memory; yields these.

        Gradients of one chunk are asked of them, so that hooks on the parameters see the sum alone.
        """
        aliases, places = [], []
        for tensor, where in zip(self.tensors, self._places, strict=True):
            now = [_Place.of(module, name) for module, name in where]
            if any(owner(place.tensor) is not owner(tensor) for place in now):
                raise RuntimeError(
                    f"{where[0][1]} {tuple(tensor.shape)} of a {type(where[0][0]).__name__} was "
                    f"replaced between the forward and the backward of mini_sequence_block"
                )
            aliases.append(now[0].tensor.detach().requires_grad_())
            places += [(place, aliases[-1]) for place in now]
        try:
            for place, alias in places:
                place.holder[place.name] = alias
            yield aliases
        finally:
            for place, _ in places:
                place.holder[place.name] = place.tensor


class _Place(NamedTuple):
    """Where a module has a tensor."""

    holder: dict[str, Any]
    name: str
    tensor: Tensor

    @classmethod
    def of(cls, module: nn.Module, name: str) -> "_Place":
        holder = vars(module) if name in vars(module) else module._parameters
        tensor: Any = holder[name]
        return cls(holder, name, tensor)


def _gradients(
    results: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The gradients of the inputs; None where no result depends on one."""
    wanted = [(y, dy) for y, dy in zip(results, gradients, strict=True) if y.requires_grad]
    if not wanted:
        return [None] * len(inputs)
    results, gradients = zip(*wanted, strict=True)
    return torch.autograd.grad(results, inputs, gradients, allow_unused=True)


def _refuse_others(results: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    """Refuse tensors that want gradients and are not among ``known``: they would get none."""
    ours = {id(tensor) for tensor in known}
    for leaf in leaves(results):
        if id(leaf) not in ours:
            raise RuntimeError(
                f"the block under mini_sequence_block reads a tensor {tuple(leaf.shape)} that "
                f"wants a gradient and is no parameter of its modules: register it with one of "
                f"them, or detach it"
            )


def _sum_of(like: Tensor, *parts: Tensor | None) -> Tensor:
    """The sum of those that are there; zeros where none is."""
    there = [part for part in parts if part is not None]
    return sum(there[1:], start=there[0]) if there else torch.zeros_like(like)


def _cut(tensors: Sequence[Tensor], rows: slice) -> list[Tensor]:
    return [tensor[..., rows, :] for tensor in tensors]


def _zeros_to_sum(like: Tensor) -> Tensor:
    contiguous = torch.contiguous_format
    return torch.zeros_like(like, dtype=_sum_dtype(like), memory_format=contiguous)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunk_rows(chunk_tokens: int | str, x_BSD: Tensor, block: RowwiseBlock) -> int:
    """Rows in a chunk, so that the results of its products and their gradients are bounded."""
    features = sum(p.numel() // p.shape[-1] for p in block.parameters() if p.ndim > 1)
    batch, sequence = x_BSD.shape[:2]
    tokens = resolve_chunk_tokens(
        chunk_tokens,
        batch * sequence,
        2 * features * x_BSD.element_size(),
        x_BSD.device,
        BLOCK_BYTES,
    )
    return -(-tokens // batch)
