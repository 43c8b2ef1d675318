"""A row-wise module of a tensor that waits on the host, computed chunk by chunk.

Such as the norm between the last block and the head: it reads one chunk of its input at a time, in
the forward and again in the backward, and each chunk of its input's gradient leaves when it is
computed (mst/on_host.py). Its result is on the device.

Legend: B batch, S sequence, D hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mst_train.mst.autocast import Autocast
from mst_train.mst.autograd import first_order_only
from mst_train.mst.block_parts import WeightGradients, gradients_of, sum_of
from mst_train.mst.on_host import OnHost, Rows, new_rows, rows_of
from mst_train.mst.parameters import Parameters


# A compiled graph would trace the nested backward away.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def rowwise(module: nn.Module, x: OnHost) -> Tensor:
    """``module(x)``, [B, S, D] -> [B, S, ...], for a module that treats each token by itself.

    Exact up to rounding: each parameter's gradient is summed over chunks in fp32 at least, and
    reaches autograd once. Random numbers, and state that changes, are not for such a module.
    """
    parameters = Parameters(module.modules())
    y: Tensor = _Rowwise.apply(  # type: ignore[no-untyped-call]
        module, parameters, x, *parameters.tensors
    )
    return y


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, module: nn.Module, parameters: Parameters, x_BSD: OnHost, *tensors: Tensor
    ) -> Tensor:
        ctx.module, ctx.parameters = module, parameters
        ctx.autocast = Autocast.here(x_BSD.device)
        ctx.save_for_backward(x_BSD, *tensors)  # which see changes in place
        chunks = x_BSD.pieces.chunks
        x = rows_of(x_BSD, chunks)
        y: Rows | None = None
        for index in range(len(chunks)):
            y_BTD = module(x.read(index, index + 1))
            y = y or Rows(y_BTD.new_empty(*x_BSD.shape[:2], *y_BTD.shape[2:]), chunks)
            y.write(index, y_BTD)
        assert y is not None
        return y.tensor

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy_BSD: Tensor) -> tuple[Tensor | None, ...]:
        x_BSD, *_ = ctx.saved_tensors
        chunks = x_BSD.pieces.chunks
        x, dy = rows_of(x_BSD, chunks), rows_of(dy_BSD, chunks)
        dx = new_rows(x_BSD, chunks, x_BSD.pieces.offload)
        with ctx.parameters.aliases() as parameters, ctx.autocast.restored():
            sums = WeightGradients(parameters, several=len(chunks) > 1)
            for index in reversed(range(len(chunks))):
                x_BTD = x.read(index, index - 1).detach().requires_grad_()
                with torch.enable_grad():
                    y_BTD = ctx.module(x_BTD)
                dx_BTD, *gradients = gradients_of(
                    (y_BTD,), (x_BTD, *parameters), (dy.read(index, index - 1),)
                )
                sums.add(gradients)
                dx.write(index, sum_of(x_BTD, dx_BTD))
                del x_BTD, y_BTD, dx_BTD, gradients
            return None, None, dx.tensor, *sums.totals()
