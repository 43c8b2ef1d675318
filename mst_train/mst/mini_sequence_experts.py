"""A mixture of experts in mini-sequences.

    p = softmax(x Wr^T);  y = sum over the top k experts e of p_e MLP_e(x)

Every token is routed and computed by itself, so the method is that of the gated MLP (mst/mlp.py):
both passes go through the tokens in chunks, and the backward rebuilds one chunk's intermediates at
a time. These are K times an expert's, and as many copies of the tokens.

The gradient of a choice's weight is that of the product before the down projection:
dp = sum(dy Wd * product), so no result of an expert is computed twice.

Legend: N tokens, C tokens of a chunk, G = C*K pairs of a token and its expert, D hidden, F
intermediate, E experts, K experts of a token.
"""

from collections.abc import Sequence
from typing import SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_kernels import glu_backward_, glu_forward
from mst_kernels.glu import ACTIVATIONS
from mst_train.mst.accumulate import WeightGradient
from mst_train.mst.autocast import Autocast, check_tensors
from mst_train.mst.chunking import chunk_slices, resolve_chunk_tokens
from mst_train.mst.experts import route
from mst_train.mst.grouped import ExpertsGradient, Pairs
from mst_train.mst.router_losses import router_losses_here
from mst_train.mst.two_nodes import two_nodes

BIASES = ("router_bias", "gate_bias", "up_bias", "down_bias")
NONE = (None,) * len(BIASES)


def working_features(hidden: int, intermediate: int, top_k: int) -> int:
    """Numbers per token alive at once in the backward: for each of its experts a copy of it and of
    its result's gradient, gate, up, their product and its gradient."""
    return top_k * (4 * intermediate + 2 * hidden)


# A compiled graph would lose the first of the two nodes, and all gradients with it.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def mini_sequence_experts(
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
    chunk_tokens: int | str = "auto",
    values: bool = True,
) -> Tensor:
    """A mixture of experts, computed in chunks of tokens in the forward and in the backward.

    Exact: the result and all gradients are those of ``gated_experts`` up to rounding, whatever the
    chunk size, and each weight's gradient reaches autograd once. The same numbers each time.

    Args:
        x: [..., D], floating point.
        router_weight: [E, D], of x's type, as the others (autocast casts all five).
        gate_weight, up_weight: [E, F, D], each expert's as in ``nn.Linear``.
        down_weight: [E, D, F].
        biases: of router [E], gate and up [E, F] and down [E, D]; None: there are none.
        top_k: K, experts of a token. normalize: their weights are divided by their sum.
        activation: as ``mini_sequence_mlp`` takes it.
        chunk_tokens: tokens computed at a time; "auto" bounds the intermediates by bytes.
        values: without, the result is there for its graph alone: it is not computed, and whatever
            reads it fails.

    Returns:
        [..., D], of x's type.

    Raises:
        ValueError: shapes or types that do not fit each other, an unknown activation or chunk
            size.
        TypeError: a module in the place of its weight, a top_k that is no whole number.

    Memory: input and output, and what ``working_features`` counts for one chunk; the backward also
    holds the weights' gradients, in fp32 while they are summed, and where torch has grouped
    products a chunk's for one of the weights, in its type. None of it depends on how many
    tokens go to which expert. Recomputation: the router's, gate and up products.
    """
    biases = tuple(biases or ())
    if len(biases) not in (0, len(BIASES)):
        raise ValueError(f"{len(biases)} biases: give all of {', '.join(BIASES)}, or none")
    given = {
        "x": x,
        "router_weight": router_weight,
        "gate_weight": gate_weight,
        "up_weight": up_weight,
        "down_weight": down_weight,
        **dict(zip(BIASES, biases, strict=False)),
    }
    check_tensors(**given)
    autocast = Autocast.here(x.device)
    tensors = [autocast.cast(tensor) for tensor in given.values()]
    _check(dict(zip(given, tensors, strict=True)), top_k, activation)
    x, _, gate_weight, *_ = tensors
    intermediate, hidden = gate_weight.shape[1:]
    bytes_per_token = working_features(hidden, intermediate, top_k) * x.element_size()
    chunk = resolve_chunk_tokens(chunk_tokens, x.numel() // hidden, bytes_per_token, x.device)
    with autocast.off():
        experts = _Experts(chunk, top_k, normalize, activation)
        return two_nodes(experts, x, tensors[1:], values=values)


def _check(tensors: dict[str, Tensor], top_k: int, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        types = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise ValueError(f"{types}: they must be of one type")
    x, router, gate, up, down, *biases = (tuple(tensor.shape) for tensor in tensors.values())
    fit = len(gate) == 3 and x[-1:] == gate[2:] and up == gate
    if not (fit and router == (gate[0], gate[2]) and down == (gate[0], gate[2], gate[1])):
        raise ValueError(
            f"x {x}, router_weight {router}, gate_weight {gate}, up_weight {up} and down_weight "
            f"{down} do not fit: expected x [..., D], router [E, D], gate and up [E, F, D], down "
            f"[E, D, F]"
        )
    if biases and biases != [gate[:1], gate[:2], gate[:2], down[:2]]:
        raise ValueError(
            f"biases {', '.join(map(str, biases))} do not fit: expected those of router [E], gate "
            f"and up [E, F] and down [E, D]"
        )
    if isinstance(top_k, bool) or not isinstance(top_k, SupportsIndex):
        raise TypeError(f"top_k={top_k!r} must be a whole number")
    if not 1 <= int(top_k) <= gate[0]:
        raise ValueError(f"top_k={top_k} is not from 1 to {gate[0]}, the number of experts")


class _Experts:
    """The mixture as ``two_nodes`` takes it: router, gate, up, down, and their biases if any."""

    def __init__(self, chunk_tokens: int, top_k: int, normalize: bool, activation: str) -> None:
        self._chunk_tokens = chunk_tokens
        self._top_k, self._normalize = top_k, normalize
        self._activation = activation
        self._losses, self._first = router_losses_here()

    def forward(self, x_ND: Tensor, weights: Sequence[Tensor], y_ND: Tensor) -> None:
        router, gate, up, down, *biases = weights
        router_bias, gate_bias, up_bias, down_bias = biases or NONE
        for chunk in chunk_slices(x_ND.shape[0], self._chunk_tokens):
            x_CD = x_ND[chunk]
            logits_CE = F.linear(x_CD, router, router_bias)
            weights_CK, indices_CK = route(logits_CE, self._top_k, self._normalize)
            if self._losses is not None and self._first:
                self._losses.record(logits_CE, indices_CK)
            del logits_CE
            pairs = Pairs(indices_CK, gate.shape[0])
            x_GD = x_CD[pairs.token_G]
            gate_GF = pairs.products(x_GD, gate.mT, gate_bias)
            up_GF = pairs.products(x_GD, up.mT, up_bias)
            del x_GD
            glu_forward(gate_GF, up_GF, self._activation, out=gate_GF)
            del up_GF
            result_GD = pairs.products(gate_GF, down.mT, down_bias)
            del gate_GF
            # A token's results in the order of its experts, whatever that of the products was.
            results_CKD = result_GD[pairs.place_CK]
            del result_GD
            torch.bmm(weights_CK[:, None], results_CKD, out=y_ND[chunk][:, None])

    def backward(
        self, dy_ND: Tensor, x_ND: Tensor, weights: Sequence[Tensor], needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        router, gate, up, down, *biases = weights
        router_bias, gate_bias, up_bias, down_bias = biases or NONE
        x_needed, router_needed, *experts_needed = needed
        biases_needed = experts_needed[3:]
        several = x_ND.shape[0] > self._chunk_tokens
        router_gradient = WeightGradient(router, several=several, needed=router_needed)
        gate_gradient, up_gradient, down_gradient = (
            ExpertsGradient(weight, several=several, needed=weight_needed)
            for weight, weight_needed in zip((gate, up, down), experts_needed, strict=False)
        )
        bias_gradients = [
            WeightGradient(bias, several=several, needed=bias_needed)
            for bias, bias_needed in zip(biases, biases_needed, strict=True)
        ]
        dx_ND = torch.empty_like(x_ND) if x_needed else None
        for chunk in chunk_slices(x_ND.shape[0], self._chunk_tokens):
            x_CD = x_ND[chunk]
            logits_CE, weights_CK, indices_CK = self._routed(x_CD, router, router_bias)
            pairs = Pairs(indices_CK, gate.shape[0])
            weights_G1 = weights_CK.detach().flatten()[pairs.order_G, None]
            x_GD, dy_GD = x_CD[pairs.token_G], dy_ND[chunk][pairs.token_G]
            gate_GF = pairs.products(x_GD, gate.mT, gate_bias)
            up_GF = pairs.products(x_GD, up.mT, up_bias)
            dproduct_GF = pairs.products(dy_GD, down)
            product_GF = glu_forward(gate_GF, up_GF, self._activation)
            dweights_G = torch.bmm(dproduct_GF[:, None], product_GF[..., None]).flatten()
            down_gradient.add_products(dy_GD, product_GF.mul_(weights_G1), pairs)
            del dy_GD, product_GF
            glu_backward_(dproduct_GF.mul_(weights_G1), gate_GF, up_GF, self._activation)
            del dproduct_GF
            dgate_GF, dup_GF = gate_GF, up_GF
            del gate_GF, up_GF
            gate_gradient.add_products(dgate_GF, x_GD, pairs)
            up_gradient.add_products(dup_GF, x_GD, pairs)
            del x_GD
            dweights_CK = dweights_G[pairs.place_CK]
            if down_bias is not None:
                dweights_CK += (dy_ND[chunk] @ down_bias.t()).gather(1, indices_CK)
            dlogits_CE = _gradient(weights_CK, logits_CE, dweights_CK)
            router_gradient.add_product(dlogits_CE, x_CD)
            if bias_gradients:
                of_router, of_gate, of_up, of_down = bias_gradients
                of_router.add(dlogits_CE.sum(0))
                each_GE = x_ND.new_zeros(len(pairs.expert_G), gate.shape[0])
                each_GE.scatter_(1, pairs.expert_G[:, None], 1)  # one_hot's would be int64
                of_gate.add_product(each_GE, dgate_GF)
                of_up.add_product(each_GE, dup_GF)
                del each_GE
                used_CE = torch.zeros_like(logits_CE).scatter_(1, indices_CK, weights_CK.detach())
                of_down.add_product(used_CE, dy_ND[chunk])
            del weights_CK, logits_CE
            if dx_ND is not None:
                dx_GD = pairs.products(dgate_GF, gate)
                del dgate_GF
                dx_GD = pairs.products(dup_GF, up, add_to=dx_GD)
                del dup_GF
                torch.sum(dx_GD[pairs.place_CK], 1, out=dx_ND[chunk])
                del dx_GD
                dx_ND[chunk].addmm_(dlogits_CE, router)
        return (
            dx_ND,
            router_gradient.result(),
            gate_gradient.result(),
            up_gradient.result(),
            down_gradient.result(),
            *(gradient.result() for gradient in bias_gradients),
        )

    def _routed(
        self, x_CD: Tensor, router_ED: Tensor, bias_E: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The router's logits [C, E]; each token's weights, with their graph from the logits on,
        and its experts, [C, K] each."""
        logits_CE = F.linear(x_CD, router_ED, bias_E).requires_grad_()
        with torch.enable_grad():
            observed_CE = logits_CE if self._losses is None else self._losses.observed(logits_CE)
            return logits_CE, *route(observed_CE, self._top_k, self._normalize)


def _gradient(y: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    (dx,) = torch.autograd.grad(y, x, dy)
    return dx
