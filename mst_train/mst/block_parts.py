"""What the schedules of a block in mini-sequences are made of (mst/block.py).

Legend: B batch, S sequence, T positions of a chunk, D hidden, H query heads, K key-value heads, E
head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mst_train.mst.accumulate import WeightGradient
from mst_train.mst.attention import AttentionKernel, Documents
from mst_train.mst.kept import ATTENTION, KeptResults
from mst_train.mst.offload import Offload, Place, Stored
from mst_train.mst.parameters import Parameters
from mst_train.mst.rerun import Rerun, leaves

RESULTS = "results"
"""Under it, and a part's name, what that part computed is kept."""


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


@dataclass(frozen=True)
class Call:
    """One call of ``mini_sequence_block``, from its forward to its backward.

    chunks: the positions of each. keep: names of what is kept beside x.
    """

    block: RowwiseBlock
    kernel: AttentionKernel
    documents: Documents | None
    chunks: list[slice]
    keep: frozenset[str]
    needs_backward: bool
    kept: "Kept"
    parameters: Parameters
    rerun: Rerun
    _results: dict[Any, KeptResults] = field(default_factory=dict)

    @property
    def keep_attention(self) -> bool:
        """Whether attention's result is kept, which the schedules compute themselves."""
        return ATTENTION in self.keep

    def results(self, part: Any) -> KeptResults:
        """What this part of the block computes, and keeps."""
        if part not in self._results:
            keep = self.keep if self.needs_backward else ()
            self._results[part] = KeptResults(keep, self.rerun.watch)
        return self._results[part]

    def save_results(self, part: Any) -> None:
        """After the first run of a part."""
        if len(self.results(part)):
            self.kept.save((RESULTS, part), *self.results(part).take())

    def load_results(self, part: Any, saved: Sequence[Tensor]) -> Sequence[Tensor]:
        """For the next run of a part; from the host they come once."""
        return self.kept.load((RESULTS, part), saved) if len(self.results(part)) else ()

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


class Kept:
    """What a block keeps from its forward for its backward, under names.

    On the device tensors are autograd's to save: it sees changes in place, and lets go of them
    after the backward. On the host they wait for their one ``load``; the last ones saved, which are
    wanted first, come back the soonest.
    """

    def __init__(self, offload: Offload | None) -> None:
        self.offload = offload
        self._on_host: dict[Any, Stored] = {}
        self._on_device: dict[Any, slice] = {}
        self._to_save: list[Tensor] = []

    def save(self, name: Any, *tensors: Tensor | Place) -> None:
        """Send these to where they wait, unless, with offload, they are there already."""
        if self.offload is not None:
            self._on_host[name] = self.offload.store(tensors)
            return
        begin = len(self._to_save)
        self._to_save += [tensor for tensor in tensors if isinstance(tensor, Tensor)]
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


class WeightGradients:
    """The gradients of a block's parameters, summed over chunks.

    parameters: the aliases that the block has while it runs again. several: chunks.
    """

    def __init__(self, parameters: Sequence[Tensor], *, several: bool) -> None:
        self.parameters = parameters
        self._several = several
        self._sums: dict[int, WeightGradient] = {}

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one for each parameter; None where nothing depends on it."""
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                if place not in self._sums:
                    weight = self.parameters[place]
                    self._sums[place] = WeightGradient(weight, several=self._several)
                self._sums[place].add(gradient)

    def totals(self) -> list[Tensor | None]:
        """One for each parameter."""
        places = range(len(self.parameters))
        return [self._sums[n].result() if n in self._sums else None for n in places]


def gradients_of(
    results: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The gradients of the inputs; None where no result depends on one."""
    wanted = [(y, dy) for y, dy in zip(results, gradients, strict=True) if y.requires_grad]
    if not wanted:
        return [None] * len(inputs)
    results, gradients = zip(*wanted, strict=True)
    return torch.autograd.grad(results, inputs, gradients, allow_unused=True)


def refuse_others(results: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    """Refuse tensors that want gradients and are not among ``known``: they would get none."""
    ours = {id(tensor) for tensor in known}
    for leaf in leaves(results):
        if id(leaf) not in ours:
            raise RuntimeError(
                f"the block under mini_sequence_block reads a tensor {tuple(leaf.shape)} that "
                f"wants a gradient and is no parameter of its modules: register it with one of "
                f"them, or detach it"
            )


def sum_of(like: Tensor, *parts: Tensor | None) -> Tensor:
    """The sum of those that are there; zeros where none is."""
    there = [part for part in parts if part is not None]
    return sum(there[1:], start=there[0]) if there else torch.zeros_like(like)
