"""Muon, for the matrices of a model's blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mst_train.config import OptimizerConfig


def build_muon(matrices: Sequence[Tensor], config: OptimizerConfig) -> torch.optim.Muon:
    """Torch's Muon (Jordan et al. 2024); each step sets its learning rate.

    The update of a matrix [m, n] is its momentum, with Nesterov's, made orthogonal in bf16, times
    0.2 sqrt(max(m, n)). That is about as large as AdamW's, so one learning rate and weight decay do
    for both (Liu et al. 2025, "Muon is Scalable for LLM Training").
    """
    return torch.optim.Muon(
        [{"params": matrices}],
        lr=0.0,
        weight_decay=config.weight_decay,
        momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )


def block_matrices(model: nn.Module) -> set[str]:
    """The names of the matrices in ``model.blocks``: not of embedding and LM head, tied or not."""
    blocks = model.get_submodule("blocks")
    inside = {id(p) for p in blocks.parameters() if p.ndim == 2}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}
