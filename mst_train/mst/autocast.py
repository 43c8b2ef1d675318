"""Autocast (mixed precision by context), as the method's functions honour it.

Under ``torch.autocast`` a linear layer casts its input and weight. The mini-sequence functions cast
theirs likewise, outside their autograd functions, so that a weight's gradient comes back in its own
type. Inside, autocast is off: what is computed there has the types that it should have.

A backward runs outside the context that its forward ran in, so what runs again there gets the
context back. It does so without autocast's cache, which would hold cast copies of all weights until
the outermost context ends.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Autocast:
    """A state of autocast on one type of device. dtype: what is cast to; None: off."""

    device_type: str
    dtype: torch.dtype | None = None

    @classmethod
    def here(cls, device: torch.device) -> "Autocast":
        """The state at this moment."""
        kind = device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return cls(kind)
        return cls(kind, torch.get_autocast_dtype(kind))

    def restored(self) -> AbstractContextManager[object]:
        """The context of this state, without a cache."""
        if self.dtype is None and Autocast.here(torch.device(self.device_type)).dtype is None:
            return nullcontext()
        return torch.autocast(
            self.device_type, self.dtype, enabled=self.dtype is not None, cache_enabled=False
        )

    def off(self) -> AbstractContextManager[object]:
        """A context without autocast."""
        return Autocast(self.device_type).restored()

    def cast(self, tensor: Tensor) -> Tensor:
        """``tensor`` as a linear layer would cast it: fp64, and what is no number, stays."""
        if self.dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(self.dtype)


def check_tensors(**arguments: Tensor) -> None:
    """TypeError where one is none, such as a linear layer in the place of its weight."""
    for name, given in arguments.items():
        if not isinstance(given, Tensor):
            weight = isinstance(getattr(given, "weight", None), Tensor)
            hint = ": give its weight" if weight else ""
            raise TypeError(f"{name} is a {type(given).__name__}, not a tensor{hint}")
