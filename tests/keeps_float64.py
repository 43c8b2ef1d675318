"""transformers in fp64, where it would compute in fp32."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class KeepsFloat64(TorchFunctionMode):
    """Leaves fp64 tensors fp64 where transformers casts to fp32 (norms, softmax, logits), and has
    its sums for each expert in fp64.

    What it has in fp32 from the start, the rotary angles, stays so.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            asked = (*args[1:], *kwargs.values())
            if function is torch.Tensor.float:
                return args[0]
            if function is torch.Tensor.to and torch.float32 in asked:
                return args[0]
            if function is F.softmax and torch.float32 in asked:
                return F.softmax(args[0], dim=kwargs["dim"])
        if (
            function is torch.zeros
            and kwargs.get("dtype") is torch.float32
            and type(args[0]) is int
        ):
            kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)
