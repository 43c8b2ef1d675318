"""What rebuilds its intermediates in the backward, as two nodes of autograd's graph.

Its backward reads its input and its weights, never its result. So the first node saves what the
backward reads and has no result yet, and the second computes it. Whoever runs it again for what
autograd had saved has everything after the first.

Legend: N tokens, D hidden.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mst_train.mst.autograd import first_order_only


class Rowwise(Protocol):
    """A function of tokens and weights. Autograd does not see what either method does."""

    def forward(self, x_ND: Tensor, weights: Sequence[Tensor], y_ND: Tensor) -> None:
        """Write the result to ``y_ND``."""
        ...

    def backward(
        self, dy_ND: Tensor, x_ND: Tensor, weights: Sequence[Tensor], needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """The gradients of x and of each weight; None where it is not ``needed``."""
        ...


def two_nodes(
    function: Rowwise, x: Tensor, weights: Sequence[Tensor], *, values: bool = True
) -> Tensor:
    """``function`` of x [..., D] and its weights, [..., D] of x's type.

    values: without, the result is there for its graph alone: it is not computed, and whatever
        reads it fails.
    """
    tensors = (x.reshape(-1, x.shape[-1]), *weights)
    y: Tensor = _Backward.apply(function, x.shape, *tensors)  # type: ignore[no-untyped-call]
    if values:
        read = (tensor.detach() for tensor in tensors)
        y = _Result.apply(y, function, *read)  # type: ignore[no-untyped-call]
    return y


class _Unread(Tensor):
    """A result that is not computed: it has a graph and no memory, and using its values fails."""

    @staticmethod
    def of(x_ND: Tensor, shape: torch.Size) -> "_Unread":
        """In the place of a result of this shape, of x's type and device."""
        unread: _Unread = Tensor._make_wrapper_subclass(
            _Unread, shape, dtype=x_ND.dtype, device=x_ND.device
        )
        return unread

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{function} reads the result of a mini-sequence function that was called with "
            f"values=False, which has none. A block hands values on to one whose result it returns "
            f"as it is, and to no other"
        )


class _Result(torch.autograd.Function):
    """The result. Saves nothing: its gradient is handed on to ``_Backward``."""

    @staticmethod
    def forward(
        ctx: Any, unread: _Unread, function: Rowwise, x_ND: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.inputs = 2 + len(weights)
        y = x_ND.new_empty(unread.shape)  # no view, so that it may be changed in place
        function.forward(x_ND, weights, y.view(x_ND.shape))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, *(None,) * ctx.inputs


class _Backward(torch.autograd.Function):
    """The backward, and everything that it reads."""

    @staticmethod
    def forward(
        ctx: Any, function: Rowwise, shape: torch.Size, x_ND: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_ND, *weights)
        ctx.function = function
        unread: _Unread = _Unread.of(x_ND, shape)
        return unread

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, *weights = ctx.saved_tensors
        dy_ND, needed = dy.reshape(x_ND.shape), ctx.needs_input_grad[2:]
        return None, None, *ctx.function.backward(dy_ND, x_ND, weights, needed)
