"""What carries tensors between processes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
Addressed = list[tuple[int, Tensor]]
"""Tensors, and the processes that they go to or come from."""


class Transport(ABC):
    """The processes of one exchange, of which this is number ``rank``."""

    @property
    @abstractmethod
    def processes(self) -> int: ...

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @abstractmethod
    def carry(self, outgoing: Addressed, incoming: Addressed) -> Callable[[], None]:
        """Start to send contiguous tensors, and to receive into others; returns what waits for all.

        What two processes send each other arrives in its order.
        """
        ...

    def start(self, sent: Sequence[Tensors], into: Sequence[Tensors]) -> Callable[[], None]:
        """Start to send tensors to each process, and to receive others from each.

        All processes call this together. What is contiguous travels out of and into the memory
        where it is; the rest has a copy on the way.

        Args:
            sent: for each process the tensors for it, not to be changed before they were waited
                for.
            into: for each process where what it sends is written.

        Returns:
            What waits until all is there.
        """
        outgoing = [
            (process, tensor.contiguous())
            for process, tensors in enumerate(sent)
            if process != self.rank
            for tensor in tensors
        ]
        places = [
            (process, place)
            for process, tensors in enumerate(into)
            if process != self.rank
            for place in tensors
        ]
        incoming = [(process, _contiguous_room(place)) for process, place in places]
        wait = self.carry(outgoing, incoming)
        del outgoing
        own = list(zip(into[self.rank], sent[self.rank], strict=True))

        def finish() -> None:
            wait()
            for (_, place), (_, arrived) in zip(places, incoming, strict=True):
                if arrived is not place:
                    place.copy_(arrived)
            incoming.clear()
            for place, tensor in own:
                if place is not tensor:
                    place.copy_(tensor)

        return finish

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors, in their order. All of them call this together."""
        if self.processes == 1:
            return tensor
        everyones = tensor.new_empty(self.processes, *tensor.shape)
        self.start([[tensor]] * self.processes, [[place] for place in everyones])()
        return everyones.sum(0)


def _contiguous_room(place: Tensor) -> Tensor:
    if place.is_contiguous():
        return place
    return torch.empty_like(place, memory_format=torch.contiguous_format)
