"""A block in mini-sequences where several processes share the sequence (mst/sharing).

Nobody's keys have all their gradients before every process's queries have read them, so attention
stands between two passes over the chunks:

    forward    before_attention of each chunk; attention; after_attention of each chunk
    backward   after_attention's of each chunk; attention's; before_attention's of each chunk

and queries, keys, values and attention's result exist for all of the process's positions. Their
gradients are written where they were.

Legend: B batch, L positions of this process, T positions of a chunk, D hidden, H query heads, K
key-value heads, E head size.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mst_train.mst.block_parts import Call, WeightGradients, gradients_of, refuse_others, sum_of
from mst_train.mst.sharing import SharedSequence
from mst_train.mst.sharing.attention import SharedAttention

INPUT, ATTENTION = "input", "attention"
"""What is kept under them: x; with ``keep_attention``, what attention's backward wants."""

BEFORE, AFTER = "before", "after"
"""A chunk's parts, before and after attention: what they compute is kept apart."""


class SharedSchedule:
    """The forward and the backward of one call, which all processes go through together."""

    def __init__(self, call: Call, sharing: SharedSequence) -> None:
        self._call = call
        self._sharing = sharing
        self._attention: SharedAttention

    def forward(self, x_BLD: Tensor, arguments: Sequence[Tensor], sinks: Tensor | None) -> Tensor:
        """The block's result, [B, L, D]."""
        call = self._call
        q_BLHE, k_BLKE, v_BLKE = self._projected(x_BLD, arguments)
        self._attention = SharedAttention.of(
            call.kernel, self._sharing, call.documents, q_BLHE, k_BLKE
        )
        out_BLHE, attended = self._attention.forward(q_BLHE, k_BLKE, v_BLKE, sinks=sinks)
        del q_BLHE, k_BLKE, v_BLKE
        if call.needs_backward:
            for chunk in call.chunks:
                call.save_results((BEFORE, chunk.start))
            call.kept.save(INPUT, x_BLD)
            if call.keep_attention:
                call.kept.save(ATTENTION, *attended)
        del attended
        y_BLD = torch.empty_like(x_BLD, memory_format=torch.contiguous_format)
        for chunk in call.chunks:
            with call.results((AFTER, chunk.start)).first():
                results = call.block.after_attention(x_BLD[:, chunk], out_BLHE[:, chunk])
            torch.add(*results, out=y_BLD[:, chunk])
            del results
            if call.needs_backward:
                call.save_results((AFTER, chunk.start))
        return y_BLD

    def backward(
        self,
        dy_BLD: Tensor,
        arguments: Sequence[Tensor],
        sinks: Tensor | None,
        saved: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """The gradients of x, of the sinks (this process's part) and of the parameters."""
        call = self._call
        dx_BLD = torch.empty_like(dy_BLD, memory_format=torch.contiguous_format)
        with call.parameters.aliases() as parameters:
            sums = WeightGradients(parameters, several=len(call.chunks) > 1)
            qkv: list[Tensor] | None = None
            kept = {
                chunk.start: call.load_results((BEFORE, chunk.start), saved)
                for chunk in call.chunks
            }
            if call.keep_attention:
                attended = [*call.kept.load(ATTENTION, saved)]
                out_BLHE = self._attention.result(attended)
                (x_BLD,) = call.kept.load(INPUT, saved)
            else:
                (x_BLD,) = call.kept.load(INPUT, saved)
                qkv = self._projected(x_BLD, arguments, kept)
                out_BLHE, attended = self._attention.forward(*qkv, sinks=sinks)
            for chunk in reversed(call.chunks):
                part = (AFTER, chunk.start)
                with call.results(part).again(call.load_results(part, saved)):
                    x, out, dy, dx = (t[:, chunk] for t in (x_BLD, out_BLHE, dy_BLD, dx_BLD))
                    self._after_attention_backward(x, out, dy, dx, sums)
            if qkv is None:  # no sooner: they need not be there beside a chunk's intermediates
                qkv = self._projected(x_BLD, arguments, kept)
            given = [out_BLHE, *qkv]  # it alone, so that they can go
            del out_BLHE, qkv
            gradients, dsinks = self._attention.backward(
                given, attended, sinks=sinks, overwrite=True
            )
            for chunk in reversed(call.chunks):
                cut = [t[:, chunk] for t in gradients]
                with call.results((BEFORE, chunk.start)).again(kept[chunk.start]):
                    self._before_attention_backward(
                        x_BLD[:, chunk], arguments, chunk, cut, dx_BLD[:, chunk], sums
                    )
            return [dx_BLD, dsinks, *sums.totals()]

    def _projected(
        self,
        x_BLD: Tensor,
        arguments: Sequence[Tensor],
        kept: Mapping[int, Sequence[Tensor]] | None = None,
    ) -> list[Tensor]:
        """Queries, keys and values of all chunks, [B, L, heads, E] each.

        kept: by their first positions, what the first run kept; None: this is the first.
        """
        whole: list[Tensor] = []
        for chunk in self._call.chunks:
            results = self._call.results((BEFORE, chunk.start))
            with results.first() if kept is None else results.again(kept[chunk.start]):
                parts = self._call.before_attention(x_BLD[:, chunk], arguments, chunk)
            if not whole:
                batch, length = x_BLD.shape[:2]
                whole = [part.new_empty(batch, length, *part.shape[2:]) for part in parts]
            for tensor, part in zip(whole, parts, strict=True):
                tensor[:, chunk] = part
            del parts
        return whole

    def _after_attention_backward(
        self,
        x_BTD: Tensor,
        out_BTHE: Tensor,
        dy_BTD: Tensor,
        dx_BTD: Tensor,
        sums: WeightGradients,
    ) -> None:
        """Writes what this part of x's gradient is to ``dx_BTD``, and out's in the place of out."""
        x, out = (t.detach().requires_grad_() for t in (x_BTD, out_BTHE))
        known = (x, out, *sums.parameters)
        with torch.enable_grad():
            results = self._call.block.after_attention(x, out, values=False)
        refuse_others(results, known)
        dx, dout, *gradients = gradients_of(results, known, (dy_BTD,) * 2)
        del results
        sums.add(gradients)
        dx_BTD.copy_(sum_of(x, dx))
        out_BTHE.copy_(sum_of(out, dout))

    def _before_attention_backward(
        self,
        x_BTD: Tensor,
        arguments: Sequence[Tensor],
        chunk: slice,
        gradients: Sequence[Tensor],
        dx_BTD: Tensor,
        sums: WeightGradients,
    ) -> None:
        """Adds the rest of x's gradient; ``gradients`` are those of q, k and v."""
        x = x_BTD.detach().requires_grad_()
        known = (x, *sums.parameters)
        with torch.enable_grad():
            results = self._call.before_attention(x, arguments, chunk)
        refuse_others(results, known)
        dx, *of_parameters = gradients_of(results, known, gradients)
        del results
        sums.add(of_parameters)
        if dx is not None:
            dx_BTD += dx
