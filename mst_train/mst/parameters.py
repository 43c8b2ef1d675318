"""The parameters of a block that runs again in the backward, a chunk at a time."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mst_train.mst.rerun import owner


class Parameters:
    """What modules hold that wants gradients: parameters, and views that FSDP puts in their places.

    Others (frozen ones) are nobody's business and stay the objects that they are.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._places: dict[Tensor, list[tuple[nn.Module, str]]] = {}
        for module in modules:
            for name, value in {**module._parameters, **vars(module)}.items():
                # Asked first, as most of what a module has is no tensor.
                wanted = getattr(value, "requires_grad", False) and isinstance(value, Tensor)
                if wanted and (value.is_leaf or value._is_view()):
                    self._places.setdefault(value, []).append((module, name))

    @property
    def tensors(self) -> list[Tensor]:
        return list(self._places)

    @contextmanager
    def aliases(self) -> Iterator[list[Tensor]]:
        """The modules with other tensors on the same memory; yields these.

        Gradients of one chunk are asked of them, so that hooks on the parameters see the sum alone.
        """
        aliases: list[Tensor] = []
        originals: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for tensor, places in self._places.items():
                for module, name in places:
                    own = name in vars(module)
                    holder: dict[str, Any] = vars(module) if own else module._parameters
                    now = holder[name]
                    if owner(now) is not owner(tensor):
                        raise RuntimeError(
                            f"{name} {tuple(tensor.shape)} of a {type(module).__name__} was "
                            f"replaced between the forward and the backward of mini_sequence_block"
                        )
                    originals.append((holder, name, now))
                aliases.append(now.detach().requires_grad_())
                for holder, name, _ in originals[-len(places) :]:
                    holder[name] = aliases[-1]
            yield aliases
        finally:
            for holder, name, original in originals:
                holder[name] = original
