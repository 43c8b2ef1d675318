"""A mixture of experts: several gated MLPs, and a router that sends each token through a few.

    p = softmax(x Wr^T);  y = sum over the top k experts e of p_e MLP_e(x)

Legend: N tokens, n tokens of one expert, D hidden, F intermediate, E experts, K experts per token.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_train.mst.mlp import gated
from mst_train.mst.router_losses import router_losses_here


def route(logits_NE: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Which experts each token goes through, and what their results are multiplied by.

    Args:
        logits_NE: [N, E], floating point, the router's.
        top_k: K, from 1 to E.
        normalize: a token's weights are divided by their sum.

    Returns:
        weights_NK: [N, K] in the logits' type, from the largest on; the softmax over all experts
            is computed in fp32 at least.
        indices_NK: [N, K] int64, of the experts.
    """
    accumulation = torch.promote_types(logits_NE.dtype, torch.float32)
    probabilities_NE = torch.softmax(logits_NE, -1, dtype=accumulation)
    weights_NK, indices_NK = torch.topk(probabilities_NE, top_k)
    if normalize:
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
    return weights_NK.to(logits_NE.dtype), indices_NK


def gated_experts(
    x: Tensor,
    router_weight: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    biases: Sequence[Tensor] | None = None,
    top_k: int,
    normalize: bool = True,
    activation: str = "silu",
) -> Tensor:
    """A mixture of experts the standard way: one after the other, autograd keeps every
    intermediate.

    The same numbers each time: an expert has a token once, and experts add up in their order.

    Args:
        x: [..., D], floating point.
        router_weight: [E, D], of x's type, as the others.
        gate_weight, up_weight: [E, F, D], each expert's as in ``nn.Linear``.
        down_weight: [E, D, F].
        biases: of router [E], gate and up [E, F] and down [E, D]; None: there are none.
        top_k, normalize: as in ``route``.
        activation: as ``gated_mlp`` takes it.

    Returns:
        [..., D], of x's type.
    """
    x_ND = x.reshape(-1, x.shape[-1])
    router_bias, *others = biases or (None,)
    logits_NE = F.linear(x_ND, router_weight, router_bias)
    losses, first = router_losses_here()
    if losses is not None:
        logits_NE = losses.observed(logits_NE)
    weights_NK, indices_NK = route(logits_NE, top_k, normalize)
    if losses is not None and first:
        losses.record(logits_NE, indices_NK)
    y_ND = torch.zeros_like(x_ND)
    # Not indexed one by one: each index would cost a gradient of all experts' size.
    weights = (weight.unbind() for weight in (gate_weight, up_weight, down_weight, *others))
    for expert, (gate, up, down, *bias) in enumerate(zip(*weights, strict=True)):
        tokens_n, places_n = _tokens_of(expert, indices_NK, len(gate_weight))
        x_nD = x_ND[tokens_n]
        gate_bias, up_bias, down_bias = bias or (None,) * 3
        product_nF = gated(F.linear(x_nD, gate, gate_bias), F.linear(x_nD, up, up_bias), activation)
        result_nD = F.linear(product_nF, down, down_bias)
        result_nD = result_nD * weights_NK[tokens_n, places_n, None]
        y_ND.index_add_(0, tokens_n, result_nD.to(y_ND.dtype))
    return y_ND.view(x.shape)


def _tokens_of(expert: int, indices_NK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The tokens that go through an expert, and where it stands among each one's experts."""
    if indices_NK.is_meta:  # indices without values: each expert has its share
        share = (indices_NK.numel() + experts - 1 - expert) // experts
        return indices_NK.new_empty(share), indices_NK.new_empty(share)
    tokens_n, places_n = torch.where(indices_NK == expert)
    return tokens_n, places_n
