"""A tensor of all tokens whose values wait on the host, in pieces of the sequence.

Blocks in mini-sequences hand on hidden states in the forward, and their gradients in the backward,
of which each reads one chunk at a time. So the values need not be on the device: a chunk leaves
when it is computed, and comes back when the next block wants it. Between them goes an ``OnHost``, a
tensor for autograd and for everyone else. Whoever reads it in another way gets its values on its
device, as a whole, and from then on they stay there for as long as it lives, so that views of it
and changes in place are what they are of any tensor. Nothing is ever written to memory that was
handed on: who holds an ``OnHost`` holds its values.

Legend: B batch, S sequence, T positions of a chunk, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mst_train.mst.offload import Offload, Place, Returning


class OnHost(Tensor):
    """[B, S, D], which waits in ``pieces``."""

    pieces: "Pieces"

    @staticmethod
    def of(pieces: "Pieces", like: Tensor) -> "OnHost":
        """A tensor of the shape, the type and the device of ``like``."""
        tensor: OnHost = Tensor._make_wrapper_subclass(
            OnHost, like.shape, dtype=like.dtype, device=like.device
        )
        tensor.pieces = pieces
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return OnHost.of(args[0].pieces, args[0])
        wholes: dict[int, OnHost] = {}

        def whole(tensor: OnHost) -> Tensor:
            values = tensor.pieces.whole()
            wholes[id(values)] = tensor
            return values

        args, kwargs = tree_map_only(OnHost, whole, (args, kwargs or {}))
        result = function(*args, **kwargs)
        return wholes.get(id(result), result)  # changed in place, it is the same tensor


class Pieces:
    """The values of one tensor, in chunks of the sequence; each is read as often as is wanted.

    offload: where they wait. chunks: the positions of each.
    """

    def __init__(self, offload: Offload, chunks: Sequence[slice]) -> None:
        self.offload = offload
        self.chunks = chunks
        self._places: dict[int, Place] = {}
        self._returning: dict[int, Returning] = {}
        self._whole: Tensor | None = None

    def put(self, index: int, piece_BTD: Tensor) -> None:
        """Send one away. The caller does not change it any more."""
        self._places[index] = self.offload.put(piece_BTD)

    def read(self, index: int, then: int) -> Tensor:
        """One on its device, [B, T, D]; ``then`` is the next that will be read, if there is one."""
        for wanted in (index, then):
            if wanted in self._places and wanted not in self._returning:
                self._returning[wanted] = self.offload.back([self._places[wanted]])
        return self._returning.pop(index).ready()[0]

    def place(self, index: int) -> Place:
        """Where one waits."""
        return self._places[index]

    @property
    def is_whole(self) -> bool:
        """Whether all values are on the device, where they may have been changed."""
        return self._whole is not None

    def whole(self) -> Tensor:
        """[B, S, D] on the device."""
        for index, chunk in enumerate(self.chunks if self._whole is None else ()):
            piece_BTD = self.read(index, index + 1)
            if self._whole is None:
                shape = (piece_BTD.shape[0], self.chunks[-1].stop, *piece_BTD.shape[2:])
                self._whole = piece_BTD.new_empty(shape)
            self._whole[:, chunk] = piece_BTD
            del piece_BTD  # not to be there with the next one
        assert self._whole is not None
        return self._whole


class Rows:
    """A tensor in memory, [B, S, D], read and written in chunks of the sequence."""

    def __init__(self, tensor: Tensor, chunks: Sequence[slice]) -> None:
        self.tensor = tensor
        self._chunks = chunks

    def read(self, index: int, then: int) -> Tensor:
        """A chunk's, [B, T, D]; ``then`` is the next that will be read, if there is one."""
        return self.tensor[:, self._chunks[index]]

    def kept(self, index: int) -> Tensor | Place:
        """What to keep of a chunk, which comes back as it is now."""
        return self.tensor[:, self._chunks[index]]

    def write(self, index: int, *terms: Tensor) -> None:
        """Write the sum of one or two terms."""
        rows_BTD = self.tensor[:, self._chunks[index]]
        if len(terms) == 1:
            rows_BTD.copy_(*terms)
        else:
            torch.add(*terms, out=rows_BTD)


class HostRows(Rows):
    """The same of one that waits on the host."""

    tensor: OnHost

    def read(self, index: int, then: int) -> Tensor:
        return self.tensor.pieces.read(index, then)

    def kept(self, index: int) -> Tensor | Place:
        return self.tensor.pieces.place(index)

    def write(self, index: int, *terms: Tensor) -> None:
        piece_BTD = torch.add(*terms) if len(terms) == 2 else terms[0]
        self.tensor.pieces.put(index, piece_BTD.to(self.tensor.dtype))


def rows_of(tensor: Tensor, chunks: Sequence[slice]) -> Rows:
    """To read a tensor in these chunks."""
    if not isinstance(tensor, OnHost):
        return Rows(tensor, chunks)
    pieces = tensor.pieces
    if pieces.is_whole or pieces.chunks != chunks:
        return Rows(pieces.whole(), chunks)
    return HostRows(tensor, chunks)


def new_rows(like: Tensor, chunks: Sequence[slice], offload: Offload | None) -> Rows:
    """To write a tensor of the shape and type of ``like``; offload: where it is to wait."""
    if offload is None:
        return Rows(torch.empty_like(like, memory_format=torch.contiguous_format), chunks)
    return HostRows(OnHost.of(Pieces(offload, chunks), like), chunks)
