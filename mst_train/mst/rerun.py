"""What makes a block's second run like its first, or refuses.

A block that runs again in the backward has to do the same. What it draws from torch's generators
can be drawn again; tensors that it reads must be as they were, which their version counters tell;
and ``parametrize.cached()`` would hand it what another run made.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes


def owner(tensor: Tensor) -> Tensor:
    """The tensor that ``tensor`` is a view of, or itself: they share memory and version."""
    return tensor if tensor._base is None else tensor._base


def version(tensor: Tensor) -> int:
    """Counts the changes in place, except of inference tensors, which have no such counter."""
    return 0 if tensor.is_inference() else tensor._version


class Unchanged:
    """Tensors that may not be changed in place while a function will read them again.

    Holds none of them: what nobody else holds cannot be changed.
    """

    def __init__(self, function: str) -> None:
        self._function = function
        self._tensors: list[tuple[weakref.ref[Tensor], int, str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """From now on."""
        self._tensors.append((weakref.ref(tensor), version(tensor), name))

    def check_forward(self) -> None:
        """At the end of the forward."""
        for name in self._changed():
            raise RuntimeError(
                f"{name} was changed in place by the block under {self._function}, which runs "
                f"again in the backward and would change it again: keep state out of the block"
            )

    def check_backward(self) -> None:
        """Before the block runs again."""
        for name in self._changed():
            raise RuntimeError(
                f"{name} was changed in place between the forward and the backward of "
                f"{self._function}, which reads it again: change it after the backward"
            )

    def _changed(self) -> Iterator[str]:
        for reference, before, name in self._tensors:
            tensor = reference()
            if tensor is not None and version(tensor) != before:
                yield f"{name} {tuple(tensor.shape)}"


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


class RandomState:
    """Where torch's own generators stand: the CPU's and, of a CUDA device, its own."""

    def __init__(self, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index])
        self._states = self._now()

    def moved(self) -> bool:
        """Whether random numbers have been drawn since. Waits for no device."""
        with _disable_current_modes():  # FakeTensorMode refuses states, which are real there too
            return not all(map(torch.equal, self._states, self._now()))

    @contextmanager
    def drawn_again(self) -> Iterator[None]:
        """In this context the same numbers come again."""
        now = self._now()
        self._set(self._states)
        try:
            yield
        finally:
            self._set(now)

    def _now(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]

    def _set(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def uncached_parametrizations() -> Iterator[None]:
    """``parametrize.cached()`` has no effect in this context."""
    enabled, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled
