"""The whole decoder block in mini-sequences.

Everything in a block but attention treats each token by itself, so a block is two row-wise pieces
around attention:

    q, k, v          = block.before_attention(x)        norm, projections, rotary embedding
    out              = attention(q, k, v)
    residual, branch = block.after_attention(x, out)    y = residual + branch, the MLP's

``mini_sequence_block`` goes through the sequence in chunks, in the forward and in the backward, and
only keys and values exist for all of it. The backward takes the last chunk first: when it comes to
one, everything that reads the chunk's keys and values has been there.

It keeps the block's input and, with ``keep_attention``, attention's result and log-sum-exp. It
computes again what the backward reads and nothing else: an MLP that ends the branch rebuilds its
own intermediates (mst/mlp.py), and nobody needs its result twice; the block is told so.

Legend: B batch, S sequence, T positions of a chunk, D hidden, H query heads, K key-value heads, E
head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mst_train.mst.accumulate import WeightGradient
from mst_train.mst.attention import AttentionKernel, Documents
from mst_train.mst.attention_chunk import attend_chunk, attend_chunk_backward
from mst_train.mst.autograd import first_order_only
from mst_train.mst.chunking import BLOCK_BYTES, chunk_slices, resolve_chunk_tokens
from mst_train.mst.offload import Offload, Stored
from mst_train.mst.parameters import Parameters
from mst_train.mst.rerun import Rerun, leaves, tensors_of, uncached_parametrizations


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
    """A decoder block, computed in chunks of the sequence in the forward and in the backward.

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
            chunks with it. No gradient reaches them.
        documents: confines attention to each document.
        chunk_tokens: tokens (T times B) computed at a time; "auto" bounds a chunk's
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
        TypeError: the block lacks its two methods, or the kernel is none.
        ValueError: an unusable chunk size, x or keys of another shape.
        RuntimeError: random numbers were drawn, from torch's default generators; a tensor was
            changed in place, by the block or before the backward; a tensor that is no parameter
            would get no gradient; a second backward where the kept tensors were offloaded.
    """
    _require_parts(block, kernel, x)
    parameters = Parameters(block.modules())
    needs_backward = torch.is_grad_enabled() and (x.requires_grad or bool(parameters.tensors))
    rerun = Rerun("mini_sequence_block", x.device)
    if needs_backward:  # and the block will run again
        for argument in row_arguments:
            rerun.watch("a row argument", argument)
        for name, tensor in tensors_of(block.modules()):
            rerun.watch(name, tensor)
    call = _Call(
        block,
        kernel,
        documents,
        list(chunk_slices(x.shape[1], _chunk_length(chunk_tokens, x, block))),
        keep_attention,
        needs_backward,
        _Kept(offload),
        parameters,
        rerun,
    )
    with rerun.autocast.restored(), uncached_parametrizations():
        y: Tensor = _MiniSequenceBlock.apply(  # type: ignore[no-untyped-call]
            call, len(row_arguments), x, *row_arguments, *parameters.tensors
        )
    if needs_backward and rerun.forward_done():
        raise RuntimeError(
            "the block under mini_sequence_block drew random numbers, and would draw others when "
            "it runs again in the backward: set dropout to 0, or take recompute_block, which "
            "draws the same again"
        )
    return y


def _require_parts(block: RowwiseBlock, kernel: AttentionKernel, x: Tensor) -> None:
    for name in ("before_attention", "after_attention"):
        if not hasattr(block, name):
            raise TypeError(
                f"{type(block).__name__} has no {name}: mini_sequence_block needs a block in two "
                f"parts (RowwiseBlock); recompute_block takes any"
            )
    if not (hasattr(kernel, "scores") and hasattr(kernel, "backward")):
        raise TypeError(
            f"{kernel} is no AttentionKernel: mst_train.attention.attention_kernel(x.device, "
            f"x.dtype) gives the one for this device"
        )
    if x.dim() != 3 or x.numel() == 0:
        raise ValueError(f"x {tuple(x.shape)} is not [B, S, D], or has no tokens")


class _Kept:
    """What a block keeps from its forward for its backward, under names.

    Under a chunk's first position: its x and, with ``keep_attention``, attention's result and
    log-sum-exp. Under KEYS_VALUES, with offload and several chunks: the whole sequence's keys and
    values.

    On the device tensors are autograd's to save: it sees changes in place, and lets go of them
    after the backward. On the host they wait for their one ``load``; the last ones saved, which are
    wanted first, come back the soonest.
    """

    KEYS_VALUES = "keys and values"

    def __init__(self, offload: Offload | None) -> None:
        self.offload = offload
        self._on_host: dict[Any, Stored] = {}
        self._on_device: dict[Any, slice] = {}
        self._to_save: list[Tensor] = []

    def save(self, name: Any, *tensors: Tensor) -> None:
        """Send these to where they wait."""
        if self.offload is not None:
            self._on_host[name] = self.offload.store(tensors)
            return
        begin = len(self._to_save)
        self._to_save += tensors
        self._on_device[name] = slice(begin, len(self._to_save))

    def hand_over(self) -> list[Tensor]:
        """What autograd has to save, and nobody else."""
        tensors, self._to_save = self._to_save, []
        return tensors

    def load(self, name: Any, saved: Sequence[Tensor]) -> Sequence[Tensor]:
        """What was saved under this name; ``saved`` is what was handed over."""
        if self.offload is None:
            return saved[self._on_device[name]]
        if name not in self._on_host:
            raise RuntimeError(
                "a second backward through mini_sequence_block: what it had offloaded came back "
                "in the first. Run the forward again, or leave offload out"
            )
        return self._on_host.pop(name).load()


@dataclass(frozen=True)
class _Call:
    """One call of ``mini_sequence_block``, from its forward to its backward.

    chunks: the positions of each.
    """

    block: RowwiseBlock
    kernel: AttentionKernel
    documents: Documents | None
    chunks: list[slice]
    keep_attention: bool
    needs_backward: bool
    kept: _Kept
    parameters: Parameters
    rerun: Rerun

    def before_attention(
        self, x_BTD: Tensor, arguments: Sequence[Tensor], chunk: slice, *, queries: bool = True
    ) -> list[Tensor]:
        """The block's, as attention takes it; without ``queries`` keys and values alone."""
        cut = [argument[..., chunk, :] for argument in arguments]
        parts = self.block.before_attention(x_BTD, *cut, queries=queries)
        if parts[1].dim() != 4 or parts[1].shape[:2] != x_BTD.shape[:2]:
            raise ValueError(
                f"before_attention gave keys {tuple(parts[1].shape)} for x {tuple(x_BTD.shape)}: "
                f"they have to be [B, T, K, E], heads after tokens"
            )
        return [self.rerun.autocast.cast(part) for part in parts if part is not None]


class _MiniSequenceBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: _Call, row_arguments: int, x_BSD: Tensor, *tensors: Tensor
    ) -> Tensor:
        kept, arguments = call.kept, tensors[:row_arguments]
        x_BSD = x_BSD.detach()  # whose views autograd may save: it sees changes of x in place
        y_BSD = torch.empty_like(x_BSD, memory_format=torch.contiguous_format)
        keys_values = _KeysValues(x_BSD.shape[1])
        for chunk in call.chunks:
            x_BTD = x_BSD[:, chunk]
            q_BTHE, *new = call.before_attention(x_BTD, arguments, chunk)
            k_BSKE, v_BSKE = keys_values.put(chunk, new)
            out, lse = attend_chunk(call.kernel, q_BTHE, k_BSKE, v_BSKE, chunk, call.documents)
            del q_BTHE, new
            if call.needs_backward:
                kept.save(chunk.start, x_BTD, *((out, lse) if call.keep_attention else ()))
            torch.add(*call.block.after_attention(x_BTD, out), out=y_BSD[:, chunk])
        if call.needs_backward and kept.offload is not None and len(call.chunks) > 1:
            kept.save(kept.KEYS_VALUES, *keys_values.tensors)
        ctx.save_for_backward(*arguments, *kept.hand_over())
        ctx.call, ctx.row_arguments = call, row_arguments
        return y_BSD

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy_BSD: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.call.rerun.again():
            saved = ctx.saved_tensors  # once: hooks of others may unpack them
            arguments, kept = saved[: ctx.row_arguments], saved[ctx.row_arguments :]
            dx_BSD, *gradients = _backward(ctx.call, dy_BSD, arguments, kept)
        return None, None, dx_BSD, *[None] * ctx.row_arguments, *gradients


def _backward(
    call: _Call, dy_BSD: Tensor, arguments: Sequence[Tensor], saved: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of x and of the parameters."""
    kept, several = call.kept, len(call.chunks) > 1
    dx_BSD = torch.empty_like(dy_BSD, memory_format=torch.contiguous_format)
    dk_BSKE = dv_BSKE = None
    with call.parameters.aliases() as parameters:
        sums: dict[int, WeightGradient] = {}

        def add(gradients: Sequence[Tensor | None]) -> None:
            for place, gradient in enumerate(gradients):
                if gradient is not None:
                    if place not in sums:
                        sums[place] = WeightGradient(parameters[place], several=several)
                    sums[place].add(gradient)

        if several:
            k_BSKE, v_BSKE = _keys_values_again(call, arguments, saved)
            dk_BSKE, dv_BSKE = map(_wide_zeros, (k_BSKE, v_BSKE))
        for chunk in reversed(call.chunks):
            x_BTD, *attention = kept.load(chunk.start, saved)
            x_BTD = x_BTD.detach().requires_grad_()
            with torch.enable_grad():
                q_BTHE, k_BTKE, v_BTKE = call.before_attention(x_BTD, arguments, chunk)
            if not several:
                k_BSKE, v_BSKE = k_BTKE.detach(), v_BTKE.detach()
            qkv = (q_BTHE.detach(), k_BSKE, v_BSKE)
            out, lse = attention or attend_chunk(call.kernel, *qkv, chunk, call.documents)
            out = out.detach().requires_grad_()
            with torch.enable_grad():
                results = call.block.after_attention(x_BTD, out, values=False)
            if chunk is call.chunks[-1]:
                _refuse_others((q_BTHE, k_BTKE, v_BTKE, *results), known=(x_BTD, out, *parameters))
            dx_BTD, dout, *gradients = _gradients(
                results, (x_BTD, out, *parameters), (dy_BSD[:, chunk],) * 2
            )
            add(gradients)
            del gradients
            dq, dk, dv = attend_chunk_backward(
                call.kernel,
                _sum_of(out, dout),
                *qkv,
                out.detach(),
                lse,
                chunk,
                call.documents,
                dk_BSKE,
                dv_BSKE,
            )
            del out, lse, attention, dout, results, qkv
            more_dx_BTD, *gradients = _gradients(
                (q_BTHE, k_BTKE, v_BTKE), (x_BTD, *parameters), (dq, dk, dv)
            )
            del q_BTHE, k_BTKE, v_BTKE, dq, dk, dv
            add(gradients)
            dx_BSD[:, chunk] = _sum_of(x_BTD, dx_BTD, more_dx_BTD)
            # What the next chunk does not need would be there at its peak.
            del x_BTD, dx_BTD, more_dx_BTD, gradients
        totals = [sums[n].result() if n in sums else None for n in range(len(parameters))]
    return [dx_BSD, *totals]


def _keys_values_again(
    call: _Call, arguments: Sequence[Tensor], saved: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Keys and values of the whole sequence, for the backward of several chunks."""
    if call.kept.offload is not None:
        return call.kept.load(call.kept.KEYS_VALUES, saved)
    keys_values = _KeysValues(call.chunks[-1].stop)
    for chunk in call.chunks:
        x_BTD = call.kept.load(chunk.start, saved)[0]
        keys_values.put(chunk, call.before_attention(x_BTD, arguments, chunk, queries=False))
    return keys_values.tensors


class _KeysValues:
    """Those of the whole sequence, put together chunk by chunk; a single one's are as they came."""

    def __init__(self, length: int) -> None:
        self._length = length
        self.tensors: list[Tensor] = []

    def put(self, chunk: slice, parts: list[Tensor]) -> list[Tensor]:
        """Put in a chunk's; all of them, of which later chunks' are not there yet."""
        if chunk.stop - chunk.start == self._length:
            self.tensors = parts
            return parts
        if not self.tensors:
            self.tensors = [
                part.new_empty(part.shape[0], self._length, *part.shape[2:]) for part in parts
            ]
        for tensor, part in zip(self.tensors, parts, strict=True):
            tensor[:, chunk] = part
        return self.tensors


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


def _wide_zeros(like: Tensor) -> Tensor:
    """For a sum, in fp32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _chunk_length(chunk_tokens: int | str, x_BSD: Tensor, block: RowwiseBlock) -> int:
    """Positions in a chunk, so that the results of its products and their gradients are bounded."""
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
