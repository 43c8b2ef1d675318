"""The validation loss by position in the sequence: does a token gain from a longer context?

Positions are put into buckets that double in size: 0 to 255, 256 to 511, 512 to 1023, and so on. A
model that uses its context has a lower loss in the later ones. The position is the one that the
rotary embedding sees, so where documents are confined to themselves it is the place in the
document.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STARTS = [0, *(256 << power for power in range(32))]
"""The first position of each bucket."""


@dataclass(frozen=True)
class Bucket:
    """The tokens from position ``start`` on that are in one bucket."""

    start: int
    loss_sum: float
    tokens: int
    """How many of them have something to predict."""

    @property
    def loss(self) -> float:
        """The mean loss per token."""
        return self.loss_sum / self.tokens


@dataclass(frozen=True)
class ValidationLoss:
    """The loss over some sequences. buckets: those that have tokens, by position."""

    buckets: list[Bucket]

    @property
    def tokens(self) -> int:
        """How many have something to predict."""
        return sum(bucket.tokens for bucket in self.buckets)

    @property
    def mean(self) -> float:
        """The mean loss per token."""
        return sum(bucket.loss_sum for bucket in self.buckets) / self.tokens

    def record(self) -> dict[str, Any]:
        """For metrics.jsonl: the mean, and the mean of each bucket by its first position."""
        by_position = {str(bucket.start): bucket.loss for bucket in self.buckets}
        return {"val_loss": self.mean, "val_loss_by_position": by_position}


class PositionLosses:
    """Sums of losses by position, over batch after batch.

    ``sums`` [2, buckets] in fp64, on the losses' device: of each bucket the sum of its losses and
    the number of its tokens. Those of several processes add up.
    """

    def __init__(self, device: torch.device) -> None:
        self._borders = torch.tensor(STARTS[1:], device=device)
        self.sums = torch.zeros(2, len(STARTS), dtype=torch.float64, device=device)

    def add(self, losses: Tensor, valid: Tensor, positions: Tensor) -> None:
        """Add the ``losses`` of tokens at ``positions`` that are ``valid`` (bool), [B, S] each."""
        bucket_N = torch.bucketize(positions.flatten(), self._borders, right=True)
        valid_N = valid.flatten().double()
        self.sums[0].index_add_(0, bucket_N, losses.flatten().double() * valid_N)
        self.sums[1].index_add_(0, bucket_N, valid_N)

    def result(self) -> ValidationLoss:
        """The mean losses so far."""
        rows = zip(STARTS, *self.sums.tolist(), strict=True)
        return ValidationLoss([Bucket(start, total, int(n)) for start, total, n in rows if n])
