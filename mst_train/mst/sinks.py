"""Attention sinks: for each query head a learned logit that takes probability and gives no value.

    p_ij = exp(score_ij) / (exp(s_h) + sum_j exp(score_ij))

A sink is one more key, with value zero, that every query of the head sees. It joins as any other
part of the keys does, by the log-sum-exp of what a kernel computed over the keys themselves:

    out'_i = out_i * sigmoid(lse_i - s_h)        lse'_i = log(exp(lse_i) + exp(s_h))

So kernels know nothing of it. Their backward is exact with out' and lse': exp(score - lse') are the
probabilities, and dout_i . out'_i is what softmax's gradient subtracts, as the sink adds zero to
it. A sink's own gradient is that of a score whose value is zero:

    ds_h = - sum_i exp(s_h - lse'_i) * (dout_i . out'_i)

Legend: B batch, T queries, H query heads, E head size.
"""

import torch
from torch import Tensor


def join_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over the keys -> attention over the keys and the sinks, where it was.

    Args:
        out: [B, T, H, E]; lse: [B, H, T]. What was computed of all keys that the queries see.
        sinks: [H], of these heads; None: there are none, and all is as it was.

    Raises ValueError where there are not as many sinks as heads.
    """
    if sinks is None:
        return out, lse
    if sinks.shape != lse.shape[1:2]:
        raise ValueError(f"sinks {tuple(sinks.shape)} for {lse.shape[1]} query heads: one for each")
    sinks_H1 = sinks.to(lse.dtype)[:, None]
    out.mul_((lse - sinks_H1).sigmoid_().transpose(1, 2).unsqueeze(-1))
    return out, torch.logaddexp(lse, sinks_H1, out=lse)


def sinks_gradient(
    sinks: Tensor, dout: Tensor, out: Tensor, lse: Tensor, others: Tensor | None = None
) -> Tensor:
    """The gradient of sinks, [H] in fp32 at least.

    Args:
        dout, out: [B, T, H, E]; lse: [B, H, T]. The result's gradient, and what ``join_sinks``
            gave.
        others: what other queries gave, to be added.

    Memory: one array of dout's shape, in fp32 at least.
    """
    inner_BTH = dout.to(lse.dtype, copy=True).mul_(out).sum(-1)
    taken_BHT = (sinks.to(lse.dtype)[:, None] - lse).exp_()
    gradient_H = taken_BHT.mul_(inner_BTH.transpose(1, 2)).sum((0, 2)).neg_()
    return gradient_H if others is None else gradient_H.add_(others)
