"""Which token follows, by a model's logits.

Legend: V vocabulary.
"""

import torch
from torch import Tensor

from mst_train.errors import UserError


class Sampler:
    """Draws tokens; the same ones for the same logits and ``seed``, on every device.

    temperature: divides the logits; 0: the most probable token, always.
    top_p: draw among the fewest of the most probable tokens whose probabilities sum to this.
    vocab_size: ids from there on have no text, and are not drawn.
    """

    def __init__(self, temperature: float, top_p: float, seed: int, vocab_size: int) -> None:
        self._temperature, self._top_p, self._vocab_size = temperature, top_p, vocab_size
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits_V: Tensor) -> int:
        """The next token. Raises UserError where the logits are no numbers."""
        logits_V = logits_V[: self._vocab_size].cpu().double()
        if not logits_V.isfinite().all():
            raise UserError("the model's logits are not finite: its weights cannot be used")
        if self._temperature == 0:
            return int(logits_V.argmax())
        probabilities_V = ((logits_V - logits_V.max()) / self._temperature).softmax(0)
        if self._top_p < 1:
            sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
            beyond_V = sorted_V.cumsum(0) - sorted_V >= self._top_p
            beyond_V[0] = False
            probabilities_V[order_V[beyond_V]] = 0
        return int(probabilities_V.multinomial(1, generator=self._generator))
