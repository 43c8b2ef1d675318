"""The whole decoder block in mini-sequences.

Everything in a block but attention treats each token by itself, so a block is two row-wise pieces
around attention:

    q, k, v          = block.before_attention(x)        norm, projections, rotary embedding
    out              = attention(q, k, v)
    residual, branch = block.after_attention(x, out)    y = residual + branch, the MLP's

``mini_sequence_block`` goes through the sequence in chunks, in the forward and in the backward, and
only keys and values exist for all of it. The backward takes the last chunk first: when it comes to
one, everything that reads the chunk's keys and values has been there.

It keeps the block's input and what else it is told to, such as attention's result (mst/kept.py). It
computes again what the backward reads and nothing else: an MLP that ends the branch rebuilds its
own intermediates (mst/mlp.py), and nobody needs its result twice; the block is told so.

Legend: B batch, S sequence, T positions of a chunk, D hidden, H query heads, K key-value heads, E
head size.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mst_train.mst.attention import AttentionKernel, Documents
from mst_train.mst.autograd import first_order_only
from mst_train.mst.block_fused import FusedSchedule
from mst_train.mst.block_parts import Call, Kept, RowwiseBlock
from mst_train.mst.block_shared import SharedSchedule
from mst_train.mst.chunking import BLOCK_BYTES, chunk_slices, resolve_chunk_tokens
from mst_train.mst.kept import ATTENTION, checked_pieces
from mst_train.mst.offload import Offload
from mst_train.mst.parameters import Parameters
from mst_train.mst.rerun import Rerun, tensors_of, uncached_parametrizations
from mst_train.mst.sharing import SharedSequence


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
    keep: Collection[str] = (ATTENTION,),
    offload: Offload | None = None,
    stream: bool = False,
    sharing: SharedSequence | None = None,
    sinks: Tensor | None = None,
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
        keep: names of what to keep rather than compute again (mst/kept.py); of the projections'
            results where the block computes them by this package's ``linear`` and
            ``mini_sequence_mlp``.
        offload: where what is kept waits; None: on its device.
        stream: with ``offload`` and several chunks, the result and x's gradient wait there too, for
            the next block and the one before to read chunk by chunk (mst/on_host.py). Whoever reads
            them in another way gets all of them on the device.
        sharing: the processes that share the sequence, of which x and the row arguments are this
            one's positions, and ``documents`` those of whole sequences. All of them call this, and
            run its backward, together.
        sinks: [H], attention's (mst/sinks.py), of all heads, in any type; None: there are none.
            Their gradient reaches autograd once, as a parameter's does.

    Returns:
        [B, S, D].

    Memory: x, and what is in ``keep`` (attention's is a tensor of q's size with one more number per
    head and token); none of them on the device with ``offload``, where keys and values wait too.
    While it runs, keys and values, in the backward also their gradients, and the intermediates of
    one chunk. Recomputation, but for what is in ``keep``: ``before_attention``, attention's
    forward, and ``after_attention`` without its last MLP; keys and values once more where there are
    several chunks and no offload.

    Raises:
        TypeError: the block lacks its two methods, or the kernel is none.
        ValueError: an unusable chunk size, an unknown name in ``keep``, x or keys of another shape.
        RuntimeError: random numbers were drawn, from torch's default generators; a tensor was
            changed in place, by the block or before the backward; a tensor that is no parameter
            would get no gradient; a second backward where the kept tensors were offloaded.
    """
    _require_parts(block, kernel, x)
    parameters = Parameters(block.modules())
    wanted = x.requires_grad or bool(parameters.tensors)
    wanted |= sinks is not None and sinks.requires_grad
    needs_backward = torch.is_grad_enabled() and wanted
    rerun = Rerun("mini_sequence_block", x.device)
    if needs_backward:  # and the block will run again
        for argument in row_arguments:
            rerun.watch("a row argument", argument)
        for name, tensor in tensors_of(block.modules()):
            rerun.watch(name, tensor)
    call = Call(
        block,
        kernel,
        documents,
        list(chunk_slices(x.shape[1], _chunk_length(chunk_tokens, x, block))),
        checked_pieces(keep),
        needs_backward,
        Kept(offload),
        parameters,
        rerun,
    )
    schedule: FusedSchedule | SharedSchedule
    if sharing is None:
        streams = stream and needs_backward and offload is not None and len(call.chunks) > 1
        schedule = FusedSchedule(call, streams=streams)
    else:
        schedule = SharedSchedule(call, sharing)
    with rerun.autocast.restored(), uncached_parametrizations():
        y: Tensor = _MiniSequenceBlock.apply(  # type: ignore[no-untyped-call]
            call, schedule, len(row_arguments), x, sinks, *row_arguments, *parameters.tensors
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


class _MiniSequenceBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        schedule: FusedSchedule | SharedSchedule,
        row_arguments: int,
        x_BSD: Tensor,
        sinks: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        arguments = tensors[:row_arguments]
        # Detached, because autograd may save views of it: it sees changes of x in place.
        y_BSD = schedule.forward(x_BSD.detach(), arguments, sinks)
        ctx.save_for_backward(sinks, *arguments, *call.kept.hand_over())
        ctx.call, ctx.schedule, ctx.row_arguments = call, schedule, row_arguments
        return y_BSD

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy_BSD: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.call.rerun.again():
            sinks, *saved = ctx.saved_tensors  # once: hooks of others may unpack them
            arguments, kept = saved[: ctx.row_arguments], saved[ctx.row_arguments :]
            dx_BSD, dsinks, *gradients = ctx.schedule.backward(dy_BSD, arguments, sinks, kept)
        dsinks = None if dsinks is None else dsinks.to(sinks.dtype)
        return None, None, None, dx_BSD, dsinks, *[None] * ctx.row_arguments, *gradients


def _chunk_length(chunk_tokens: int | str, x_BSD: Tensor, block: RowwiseBlock) -> int:
    """Positions in a chunk, so that the results of its products and their gradients are bounded."""
    features = sum(map(_product_features, block.modules()))
    batch, sequence = x_BSD.shape[:2]
    tokens = resolve_chunk_tokens(
        chunk_tokens,
        batch * sequence,
        2 * features * x_BSD.element_size(),
        x_BSD.device,
        BLOCK_BYTES,
    )
    return -(-tokens // batch)


def _product_features(module: nn.Module) -> int:
    """Features of the results of a module's own products, per token."""
    features = getattr(module, "product_features", None)
    if isinstance(features, int):  # it computes with some of its matrices, or has others
        return features
    return sum(p.numel() // p.shape[-1] for p in module.parameters(recurse=False) if p.ndim > 1)
