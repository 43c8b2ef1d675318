"""A block in mini-sequences where this process has the whole sequence.

Forward: each chunk projects its tokens, attends to the keys so far, and goes on to its result.
Backward: the last chunk first. When it comes to one, everything that reads the chunk's keys and
values has been there, so one pass does all, and only keys, values and their gradients exist for the
whole sequence.

Legend: B batch, S sequence, T positions of a chunk, D hidden, H query heads, K key-value heads, E
head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mst_train.mst.accumulate import wide_zeros
from mst_train.mst.attention_chunk import attend_chunk, attend_chunk_backward
from mst_train.mst.block_parts import Call, WeightGradients, gradients_of, refuse_others, sum_of
from mst_train.mst.on_host import new_rows, rows_of
from mst_train.mst.sinks import sinks_gradient

KEYS_VALUES = "keys and values"
"""What is kept under it, with offload and several chunks; a chunk's x and attention's result and
log-sum-exp are kept under its first position."""


class FusedSchedule:
    """The forward and the backward of one call.

    streams: whether the result, and x's gradient, wait on the host (mst/on_host.py).
    """

    def __init__(self, call: Call, *, streams: bool) -> None:
        self._call = call
        self._results_wait = call.kept.offload if streams else None

    def forward(self, x_BSD: Tensor, arguments: Sequence[Tensor], sinks: Tensor | None) -> Tensor:
        """The block's result, [B, S, D]."""
        call, kept = self._call, self._call.kept
        x, y = rows_of(x_BSD, call.chunks), new_rows(x_BSD, call.chunks, self._results_wait)
        keys_values = _KeysValues(x_BSD.shape[1])
        for index, chunk in enumerate(call.chunks):
            x_BTD = x.read(index, index + 1)
            results = call.results(chunk.start)
            with results.first():
                q_BTHE, *new = call.before_attention(x_BTD, arguments, chunk)
            k_BSKE, v_BSKE = keys_values.put(chunk, new)
            qkv = (q_BTHE, k_BSKE, v_BSKE)
            out, lse = attend_chunk(call.kernel, *qkv, chunk, call.documents, sinks)
            del qkv, q_BTHE, new
            if call.needs_backward:
                kept_x = x_BTD if kept.offload is None else x.kept(index)
                kept.save(chunk.start, kept_x, *((out, lse) if call.keep_attention else ()))
            with results.first():
                y.write(index, *call.block.after_attention(x_BTD, out))
            if call.needs_backward:
                call.save_results(chunk.start)
        if call.needs_backward and kept.offload is not None and len(call.chunks) > 1:
            kept.save(KEYS_VALUES, *keys_values.tensors)
        return y.tensor

    def backward(
        self,
        dy_BSD: Tensor,
        arguments: Sequence[Tensor],
        sinks: Tensor | None,
        saved: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """The gradients of x, of the sinks and of the parameters."""
        call, several = self._call, len(self._call.chunks) > 1
        dy, dx = rows_of(dy_BSD, call.chunks), new_rows(dy_BSD, call.chunks, self._results_wait)
        dk_BSKE = dv_BSKE = None
        dsinks: Tensor | None = None
        with call.parameters.aliases() as parameters:
            sums = WeightGradients(parameters, several=several)
            if several:
                k_BSKE, v_BSKE = self._keys_values_again(arguments, saved)
                dk_BSKE, dv_BSKE = map(wide_zeros, (k_BSKE, v_BSKE))
            for index, chunk in reversed([*enumerate(call.chunks)]):
                # The last ones saved come back from the host the soonest.
                products = call.load_results(chunk.start, saved)
                x_BTD, *attention = call.kept.load(chunk.start, saved)
                x_BTD = x_BTD.detach().requires_grad_()
                with call.results(chunk.start).again(products):
                    with torch.enable_grad():
                        q_BTHE, k_BTKE, v_BTKE = call.before_attention(x_BTD, arguments, chunk)
                    if not several:
                        k_BSKE, v_BSKE = k_BTKE.detach(), v_BTKE.detach()
                    qkv = (q_BTHE.detach(), k_BSKE, v_BSKE)
                    out, lse = attention or attend_chunk(
                        call.kernel, *qkv, chunk, call.documents, sinks
                    )
                    out = out.detach().requires_grad_()
                    with torch.enable_grad():
                        results = call.block.after_attention(x_BTD, out, values=False)
                del products
                if chunk is call.chunks[-1]:
                    known = (x_BTD, out, *parameters)
                    refuse_others((q_BTHE, k_BTKE, v_BTKE, *results), known)
                dy_BTD = dy.read(index, index - 1)
                dx_BTD, dout, *gradients = gradients_of(
                    results, (x_BTD, out, *parameters), (dy_BTD,) * 2
                )
                del dy_BTD
                sums.add(gradients)
                del gradients
                dout = sum_of(out, dout)
                if sinks is not None:
                    dsinks = sinks_gradient(sinks, dout, out.detach(), lse, dsinks)
                dq, dk, dv = attend_chunk_backward(
                    call.kernel,
                    dout,
                    *qkv,
                    out.detach(),
                    lse,
                    chunk,
                    call.documents,
                    dk_BSKE,
                    dv_BSKE,
                )
                del out, lse, attention, dout, results, qkv
                more_dx_BTD, *gradients = gradients_of(
                    (q_BTHE, k_BTKE, v_BTKE), (x_BTD, *parameters), (dq, dk, dv)
                )
                del q_BTHE, k_BTKE, v_BTKE, dq, dk, dv
                sums.add(gradients)
                dx.write(index, sum_of(x_BTD, dx_BTD, more_dx_BTD))
                # What the next chunk does not need would be there at its peak.
                del x_BTD, dx_BTD, more_dx_BTD, gradients
            return [dx.tensor, dsinks, *sums.totals()]

    def _keys_values_again(
        self, arguments: Sequence[Tensor], saved: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Keys and values of the whole sequence, for the backward of several chunks."""
        call = self._call
        if call.kept.offload is not None:
            return call.kept.load(KEYS_VALUES, saved)
        keys_values = _KeysValues(call.chunks[-1].stop)
        for chunk in call.chunks:
            x_BTD = call.kept.load(chunk.start, saved)[0]
            with call.results(chunk.start).again(call.load_results(chunk.start, saved)):
                new = call.before_attention(x_BTD, arguments, chunk, queries=False)
            keys_values.put(chunk, new)
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
