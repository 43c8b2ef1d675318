"""What the method's autograd functions share."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mst_train.mst.autocast import Autocast


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a backward that cannot itself be differentiated: it refuses where it would be.

    ``once_differentiable`` alone lets a gradient of a gradient pass as zero where the incoming
    gradient needs none.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "mini-sequence functions are differentiable once: leave out create_graph=True, or "
                "use the plain implementation for gradients of gradients"
            )
        with Autocast(gradients[0].device.type).off():  # whatever surrounds the backward
            return once(ctx, *gradients)

    return checked
