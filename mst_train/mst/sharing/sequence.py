"""A shared sequence: who has which positions, and what carries tensors between them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mst_train.mst.sharing.places import Places
from mst_train.mst.sharing.transport import Transport


@dataclass(frozen=True)
class SharedSequence:
    """One process's part in sequences that it shares.

    places: who has which positions. heads: the processes of its node. keys: those that have its
    heads in the other nodes. keys_at_once: key-value heads that go through attention at a time;
    None: all.
    """

    places: Places
    heads: Transport
    keys: Transport
    keys_at_once: int | None = None

    def own(self, tensor: Tensor) -> Tensor:
        """This process's positions of whole sequences, [B, S, ...] -> [B, L, ...]."""
        return torch.cat([tensor[:, part] for part in self.places.own(tensor.shape[1])], dim=1)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of all processes' tensors, the same on each. All of them call this together."""
        return self.keys.sum(self.heads.sum(numbers))
