"""Muon, for the matrices of a model's blocks."""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mst_train.config import OptimizerConfig


def build_muon(matrices: Sequence[Tensor], config: OptimizerConfig) -> torch.optim.Muon:
    """Torch's Muon (Jordan et al. 2024); each step sets its learning rate.

    matrices: [m, n], or [E, m, n]: so many experts' matrices, each updated by itself.

    The update of a matrix [m, n] is its momentum, with Nesterov's, made orthogonal in bf16, times
    0.2 sqrt(max(m, n)). That is about as large as AdamW's, so one learning rate and weight decay do
    for both (Liu et al. 2025, "Muon is Scalable for LLM Training").
    """
    return _Muon(
        matrices,
        lr=0.0,
        weight_decay=config.weight_decay,
        momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )


class _Muon(torch.optim.Muon):
    """Torch's, which has matrices alone: it is given views of those of each expert."""

    def __init__(self, matrices: Sequence[Tensor], **options: Any) -> None:
        super().__init__([{"params": [w for w in matrices if w.ndim == 2]}], **options)
        self.param_groups[0]["params"] += [w for w in matrices if w.ndim == 3]

    def _init_group(
        self,
        group: MutableMapping[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        muon_momentum_bufs: list[Tensor],
    ) -> bool:
        lists = (params_with_grad, grads, muon_momentum_bufs)
        found: bool = super()._init_group(group, *lists)
        for tensors in lists:
            parts = [t.detach().unbind() if t.ndim == 3 else (t,) for t in tensors]
            tensors[:] = [matrix for part in parts for matrix in part]
        return found


def block_matrices(model: nn.Module) -> set[str]:
    """The names of the matrices in ``model.blocks``: not of embedding and LM head, tied or not."""
    blocks = model.get_submodule("blocks")
    inside = {id(p) for p in blocks.parameters() if p.ndim > 1}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}
