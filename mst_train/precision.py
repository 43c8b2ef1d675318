"""The types that ``precision`` names."""

import torch


def weight_type(precision: str) -> torch.dtype:
    """The type of the model's own weights and of what it computes, which are bf16 in "bf16_master"
    too: there the optimizer alone has them in fp32."""
    return torch.float32 if precision == "fp32" else torch.bfloat16
