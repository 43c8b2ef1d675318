"""What a block's forward computed and keeps, handed over where the block runs again.

A block that is recomputed keeps its input, and need keep nothing else. Whatever else it keeps saves
the time of computing it again, and takes memory until the backward. What is large has names:

    attention   attention's result and log-sum-exp
    keys        the key and value projections' results
    queries     the query projection's
    output      the output projection's
    mlp         the gate and up projections'

With all of them a block that runs again computes no product, but norms, rotations and activations.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mst_train.mst.autocast import Autocast
from mst_train.mst.autograd import first_order_only

ATTENTION, KEYS, QUERIES, OUTPUT, MLP = "attention", "keys", "queries", "output", "mlp"
PIECES = (ATTENTION, KEYS, QUERIES, OUTPUT, MLP)
"""What a block may keep beside its input."""


def checked_pieces(keep: Collection[str]) -> frozenset[str]:
    """``keep`` as a set; ValueError where it has a name that is none of ``PIECES``."""
    unknown = [keep] if isinstance(keep, str) else sorted(set(keep) - set(PIECES))
    if unknown:
        raise ValueError(f"keep={unknown[0]!r}: it takes a collection of {', '.join(PIECES)}")
    return frozenset(keep)


class KeptResults:
    """What was computed under some names in a block's first run, or in that of one of its chunks.

    names: of what is kept. watch: hears of each tensor, with words for it, that none may change.
    """

    def __init__(
        self, names: Collection[str], watch: Callable[[str, Tensor], None] | None = None
    ) -> None:
        self.names = names
        self._watch = watch
        self._order: list[str] = []
        self._tensors: list[Tensor] = []
        self._left: dict[str, Iterator[Tensor]] | None = None

    @contextmanager
    def first(self) -> Iterator[None]:
        """The context of the first run, or of a part of it."""
        token = _here.set(self)
        try:
            yield
        finally:
            _here.reset(token)

    @contextmanager
    def again(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """The context of another run, or of a part of it, to which ``tensors`` are handed over:
        those that ``take`` gave."""
        pairs = [*zip(self._order, tensors, strict=True)]
        self._left = {name: iter([t for n, t in pairs if n == name]) for name in self.names}
        try:
            with self.first():
                yield
        finally:
            self._left = None

    def take(self) -> list[Tensor]:
        """What was kept, for somebody else to hold."""
        tensors, self._tensors = self._tensors, []
        return tensors

    def __len__(self) -> int:
        """How many tensors were kept."""
        return len(self._order)

    def record(self, name: str, results: Sequence[Tensor]) -> None:
        """Keep these where this is the first run."""
        if self._left is not None or name not in self.names:
            return
        for result in results:
            self._order.append(name)
            self._tensors.append(result.detach())
            if self._watch is not None:
                self._watch(f"{name}'s result", self._tensors[-1])

    def handed(self, name: str, count: int) -> list[Tensor]:
        """The next ``count`` that were kept under the name; none in the first run."""
        left = () if self._left is None else self._left.get(name, ())
        return [tensor for _, tensor in zip(range(count), left, strict=False)]


_NOTHING = KeptResults(())
_here: ContextVar[KeptResults] = ContextVar("kept_results", default=_NOTHING)


def kept_here() -> KeptResults:
    """What is kept in the present context."""
    return _here.get()


def linear(layer: nn.Linear, x: Tensor, name: str, *, copy: bool = False) -> Tensor:
    """``layer(x)``, which a block can keep under a name; where it does, the layer's weight and bias
    alone count.

    copy: what is kept is a copy, and the result may be changed in place.
    """
    if name not in kept_here().names:
        y: Tensor = layer(x)
        return y
    autocast = Autocast.here(x.device)
    x, weight = autocast.cast(x), autocast.cast(layer.weight)
    bias = None if layer.bias is None else autocast.cast(layer.bias)
    with autocast.off():
        y = _Linear.apply(x, weight, bias, name, copy)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, name: str, copy: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        kept = kept_here()
        y = next(iter(kept.handed(name, 1)), None)
        if y is None:
            y = F.linear(x, weight, bias)
            kept.record(name, (y,))
        return y.clone() if copy else y.detach()

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_needed, weight_needed, bias_needed, *_ = ctx.needs_input_grad
        dy_NO = dy.flatten(0, -2)
        dx = dy @ weight if x_needed else None
        dweight = dy_NO.t() @ x.flatten(0, -2) if weight_needed else None
        return dx, dweight, dy_NO.sum(0) if bias_needed else None, None, None
