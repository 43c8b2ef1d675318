"""What makes a block's second run like its first, or refuses.

A block that runs again in the backward has to do the same. What it draws from torch's generators
can be drawn again; tensors that it reads must be as they were, which their version counters tell;
autocast must be as it was; and ``parametrize.cached()`` would hand it what another run made.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes

from mst_train.mst.autocast import Autocast
from mst_train.mst.router_losses import again, router_losses_here


class Rerun:
    """One block's second run, made ready before its first.

    function: whose block it is, as messages name it.
    """

    def __init__(self, function: str, device: torch.device) -> None:
        self.autocast = Autocast.here(device)
        self._router_losses, _ = router_losses_here()
        self._function = function
        self._watched: list[tuple[weakref.ref[Tensor], int, str]] = []
        self._devices = [device] if device.type == "cuda" else []
        generators = [torch.cuda.default_generators[device.index] for device in self._devices]
        generators.append(torch.default_generator)
        self._random = [(generator, generator.get_state()) for generator in generators]

    def watch(self, name: str, tensor: Tensor) -> None:
        """From now on this may not be changed in place. It is not held: what nobody else holds
        cannot be changed."""
        self._watched.append((weakref.ref(tensor), version(tensor), name))

    def forward_done(self) -> bool:
        """After the first run; whether it drew random numbers. Waits for no device.

        Raises RuntimeError where the block changed what is watched.
        """
        for name in self._changed():
            raise RuntimeError(
                f"{name} was changed in place by the block under {self._function}, which runs "
                f"again in the backward and would change it again: keep state out of the block"
            )
        with _disable_current_modes():  # FakeTensorMode refuses states, which are real there too
            if all(torch.equal(before, now.get_state()) for now, before in self._random):
                self._random = []
        return bool(self._random)

    @contextmanager
    def again(self) -> Iterator[None]:
        """The context of the second run, in which the same random numbers come again.

        Raises RuntimeError where what is watched was changed since.
        """
        for name in self._changed():
            raise RuntimeError(
                f"{name} was changed in place between the forward and the backward of "
                f"{self._function}, which reads it again: change it after the backward"
            )
        with (
            torch.random.fork_rng(self._devices, enabled=bool(self._random)),
            self.autocast.restored(),
            again(self._router_losses),
            uncached_parametrizations(),
        ):
            for generator, state in self._random:
                generator.set_state(state)
            yield

    def _changed(self) -> Iterator[str]:
        for reference, before, name in self._watched:
            tensor = reference()
            if tensor is not None and version(tensor) != before:
                yield f"{name} {tuple(tensor.shape)}"


def owner(tensor: Tensor) -> Tensor:
    """The tensor that ``tensor`` is a view of, or itself: they share memory and version."""
    return tensor if tensor._base is None else tensor._base


def version(tensor: Tensor) -> int:
    """Counts the changes in place, except of inference tensors, which have no such counter."""
    return 0 if tensor.is_inference() else tensor._version


def tensors_of(modules: Iterable[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that modules have themselves, with names."""
    for module in modules:
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None:
                yield f"{type(module).__name__}.{name}", tensor


def leaves(results: Iterable[Tensor], after: Iterable[Tensor] = ()) -> Iterator[Tensor]:
    """The tensors that the graph of ``results`` begins with, as far as it is not that of ``after``.

    Some microseconds for each node of the graph.
    """
    seen: set[Any] = {None, *(tensor.grad_fn for tensor in after)}
    nodes: list[Any] = []
    for result in results:
        nodes.append(result.grad_fn)
        if result.requires_grad and result.is_leaf:
            yield result
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            if not node.next_functions and hasattr(node, "variable"):
                yield node.variable


@contextmanager
def uncached_parametrizations() -> Iterator[None]:
    """``parametrize.cached()`` has no effect in this context."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled
