"""Whether a module's call is what its class says, as its package wrote it.

The method computes what some modules would have computed, and does not call them. Hooks on such a
module, a ``forward`` of its own, or a function that somebody has put in the place of the package's
would be left out. They are found here, by where functions come from, and named.
"""

import inspect
import sys
from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

BASE = "_mini_sequence_of"
"""The attribute of a class with mini-sequences that is the class it was made for."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

INACTIVE = "transformers.utils.output_capturing"
"""Its hooks do nothing but in calls that ask for attentions or hidden states."""

PACKAGES = ("transformers", "torch")
"""Whose functions a class's forward is expected to be and to call."""

WEIGHTS_ONLY = ("deepspeed", "torch.distributed")
"""Packages whose hooks see to it that a module's weights are there when it is called."""


def altered(module: nn.Module, *, called: bool = False) -> str | None:
    """What a module's call does besides its class's forward, or in its place.

    Accelerate's moving of arguments to the module's device is nothing besides.

    called: the module is called all the same, so nor is what makes its weights whole for its call.
    """
    cls = base_of(type(module))
    forward = vars(module).get("forward")
    if not (forward is None or _bound(forward, type(module)) or _aligned(module, offload=called)):
        return f"has a forward of its own ({origin(forward)})"
    for hook in _hooks(module):
        if not (called and origin(hook).startswith(WEIGHTS_ONLY)):
            return f"has a hook ({origin(hook)})"
    return rewritten(cls.forward)


def unreached(module: nn.Module, cls: Any) -> str | None:
    """What would keep a module, once it is of class ``cls``, from calling that class's forward."""
    forward = vars(module).get("forward")
    inner = vars(module)["_old_forward"] if _hooked(module) else forward
    reached = (
        inner is None
        or _bound(inner, type(module))
        or _innermost(inner) is _innermost(cls.forward)  # wrapped when the class was this before
    )
    return None if reached else f"has a forward of its own ({origin(forward)})"


def rebind(module: nn.Module, before: type) -> None:
    """Let what an instance or Accelerate has kept of its class's forward be that of its class now.

    before: the class that it was of.
    """
    for name in ("forward", "_old_forward"):
        if _bound(vars(module).get(name), before):
            setattr(module, name, MethodType(type(module).forward, module))


def base_of(cls: type) -> Any:
    """A class, or the one that its forward with mini-sequences was made for."""
    return getattr(cls, BASE, cls)


def rewritten(forward: Any) -> str | None:
    """What of a class's forward is not its package's: itself, or a function that it calls."""
    inside = _innermost(forward)
    for function in (inside, *_wrappers(forward), *_called(inside)):
        if origin(function).partition(".")[0] not in PACKAGES:
            return f"runs {origin(function)}, which is not transformers' own"
    return None


def origin(function: Any) -> str:
    """Where a function, or an object's class, comes from: its module and name."""
    while isinstance(function, partial | MethodType):
        function = function.func if isinstance(function, partial) else function.__func__
    if not hasattr(function, "__globals__"):
        function = type(function)
        return f"{function.__module__}.{function.__qualname__}"
    # Not __module__ and __qualname__, which functools.wraps takes from what is wrapped.
    return f"{function.__globals__['__name__']}.{function.__code__.co_qualname}"


def _called(function: Any) -> Iterator[Any]:
    """What a function calls by names of its module, and what functions of that module call."""
    names, found, functions = function.__globals__, set(), [function]
    for caller in functions:
        for name in caller.__code__.co_names:
            called = names.get(name)
            if name in found or not callable(called) or isinstance(called, type):
                continue
            found.add(name)
            yield called
            yield from _wrappers(called)
            if getattr(called, "__globals__", None) is names:
                functions.append(called)


def _wrappers(function: Any) -> Iterator[Any]:
    """A function and what it wraps, but for the innermost."""
    while hasattr(function, "__wrapped__"):
        yield function
        function = function.__wrapped__


def _hooks(module: nn.Module) -> Iterator[Any]:
    for kind in HOOKS:
        for hook in getattr(module, kind).values():
            if not origin(hook).startswith(INACTIVE):
                yield hook


def _innermost(forward: Any) -> Any:
    function = inspect.unwrap(forward)
    return getattr(function, "__func__", function)


def _hooked(module: nn.Module) -> bool:
    """Whether a module's own forward is Accelerate's: hooks around what was the module's."""
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and origin(forward).startswith("accelerate.hooks.")


def _aligned(module: nn.Module, *, offload: bool) -> bool:
    """Whether a module's own forward moves arguments to its device and calls its class's.

    offload: it may move weights there as well.
    """
    if not _hooked(module):
        return False
    accelerate = sys.modules["accelerate.hooks"]  # there since it made the forward
    hook: Any = module._hf_hook
    hooks = hook.hooks if isinstance(hook, accelerate.SequentialHook) else [hook]
    return _bound(module._old_forward, type(module)) and all(
        type(hook) is accelerate.AlignDevicesHook and (offload or not hook.offload)
        for hook in hooks
    )


def _bound(forward: Any, cls: Any) -> bool:
    """Whether a function is a method of a class, bound to an object: its forward."""
    function = getattr(forward, "__func__", None)
    return function is not None and function in (cls.forward, _innermost(cls.forward))
