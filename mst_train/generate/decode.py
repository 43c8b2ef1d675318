"""A decoder that goes on with what it has read: keys and values are kept, not computed again.

The decoder is the one that trains, under its own forward. Only its attention is another, which
remembers.

Legend: B batch, S sequence, H query heads, K key-value heads, G = H/K, E head size.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mst_train.attention import Attention
from mst_train.attention.reference import ReferenceKernel
from mst_train.model import Transformer
from mst_train.mst import Documents, Scores
from mst_train.mst.attention import PLAIN
from mst_train.mst.sinks import join_sinks


class CachedAttention:
    """Attention to the tokens of its first call, a whole prompt, and of all later ones, one each.

    Each layer has one of its own (``of``), for one text. It holds all keys and values that it was
    given, or the last window of them. The prompt goes to ``attention``; a later token's scores are
    the formula's, [B, H, 1, S] in fp32 at least.
    """

    def __init__(self, attention: Attention, scores: Scores = PLAIN) -> None:
        """attention: one that computes these ``scores``."""
        self._attention = attention
        self._seen = slice(-(scores.window or 0), None)
        self._kernel = ReferenceKernel(replace(scores, window=None))
        self._kept: tuple[Tensor, Tensor] | None = None

    def of(self, scores: Scores) -> "CachedAttention":
        return CachedAttention(self._attention.of(scores), scores)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        assert documents is None
        if self._kept is None:
            self._kept = k[:, self._seen], v[:, self._seen]
            return self._attention(q, k, v, sinks=sinks)
        assert q.shape[1] == 1
        k, v = (
            torch.cat([kept, new], 1)[:, self._seen]
            for kept, new in zip(self._kept, (k, v), strict=True)
        )
        self._kept = k, v
        # Query heads with the same keys are to the kernel as many queries of one head.
        q_BGKE = q[:, 0].unflatten(1, (k.shape[2], -1)).transpose(1, 2)
        out_BGKE, lse_BKG = self._kernel.forward(q_BGKE, k, v, causal=False)
        out = out_BGKE.transpose(1, 2).reshape(q.shape)
        return join_sinks(out, lse_BKG.flatten(1)[..., None], sinks)[0]


def continuation(
    model: Transformer, prompt: list[int], choose: Callable[[Tensor], int]
) -> Iterator[int]:
    """The tokens that follow a prompt, without end.

    Args:
        model: a decoder with ``CachedAttention``, for this one text.
        prompt: one token at least.
        choose: the next token, given its logits [V].

    Memory: the keys and values of all that was read, and the logits of one token.
    """
    tokens, position = prompt, 0
    while True:
        token = choose(_read(model, tokens, position))
        yield token
        position += len(tokens)
        tokens = [token]


@torch.no_grad()
def _read(model: Transformer, tokens: list[int], position: int) -> Tensor:
    """The logits [V] of what follows ``tokens``, the first of which is at ``position``."""
    device = model.embedding.weight.device
    positions = torch.arange(position, position + len(tokens), device=device)
    hidden_BSD = model.hidden(torch.tensor([tokens], device=device), positions)
    return model.head_logits(hidden_BSD[0, -1])
