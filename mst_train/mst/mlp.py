"""The gated MLP in mini-sequences.

    y = (act(x Wg^T) * (x Wu^T)) Wd^T

Its intermediates (gate, up, their product) are ``intermediate_size`` wide, 3.5 times the hidden
state in Llama3-8B, and every token's are independent of every other token's. So both passes go
through the tokens in chunks: the forward keeps nothing but its input, and the backward rebuilds one
chunk's intermediates at a time (Mini-Sequence Transformer, section 3.1).

A block may keep gate and up (mst/kept.py), of all its tokens then; the backward rebuilds neither.

Legend: N tokens, C tokens of a chunk, D hidden, F intermediate.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_kernels import glu_backward_, glu_forward
from mst_kernels.glu import ACTIVATIONS, CLAMPED, LIMIT, SLOPE
from mst_train.mst.accumulate import WeightGradient
from mst_train.mst.autocast import Autocast, check_tensors
from mst_train.mst.chunking import chunk_slices, resolve_chunk_tokens
from mst_train.mst.kept import MLP, kept_here
from mst_train.mst.two_nodes import two_nodes

BACKWARD_INTERMEDIATES = 3
"""Arrays of [C, F] alive at once in the backward: gate, up and their product."""


def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    activation: str = "silu",
) -> Tensor:
    """The same MLP as one piece, the standard way: autograd keeps every intermediate.

    Shapes and types as in ``mini_sequence_mlp``.
    """
    gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
    return F.linear(gated(gate, up, activation), down_weight)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """What the down projection reads, by torch's own operations (mst_kernels/glu.py)."""
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if activation == CLAMPED:
        gate = gate.clamp(max=LIMIT)
        return gate * torch.sigmoid(SLOPE * gate) * (up.clamp(-LIMIT, LIMIT) + 1)
    raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")


# A compiled graph would lose the first of the two nodes, and all gradients with it.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def mini_sequence_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    chunk_tokens: int | str = "auto",
    activation: str = "silu",
    values: bool = True,
) -> Tensor:
    """The gated MLP, computed in chunks of tokens in the forward and in the backward.

    Exact: the result and all gradients are those of ``gated_mlp`` up to rounding, whatever the
    chunk size, and each weight's gradient reaches autograd once.

    Args:
        x: [..., D], floating point.
        gate_weight, up_weight: [F, D] as in ``nn.Linear``, of x's type (autocast casts all four).
        down_weight: [D, F], of x's type.
        chunk_tokens: tokens computed at a time; "auto" bounds the intermediates by bytes.
        activation: "silu" (SwiGLU), "gelu_tanh" (GeGLU) or "clamped_swiglu" (gpt-oss).
        values: without, the result is there for its graph alone: it is not computed, and whatever
            reads it fails.

    Returns:
        [..., D], of x's type.

    Raises:
        ValueError: shapes that do not fit each other, an unknown activation or chunk size.
        TypeError: a module in the place of its weight.

    Memory: input and output, and the intermediates of one chunk (two arrays of [C, F] in the
    forward, three in the backward); the backward also holds the weights' gradients, in fp32 while
    they are summed. Recomputation: the gate and up products, so 11 products in all where the
    standard MLP has 9; none where a block keeps them.
    """
    check_tensors(x=x, gate_weight=gate_weight, up_weight=up_weight, down_weight=down_weight)
    if gate_weight.ndim != 2:
        raise ValueError(f"gate_weight {tuple(gate_weight.shape)} must be [F, D]")
    intermediate, hidden = gate_weight.shape
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    autocast = Autocast.here(x.device)
    x, gate_weight, up_weight, down_weight = map(
        autocast.cast, (x, gate_weight, up_weight, down_weight)
    )
    if {gate_weight.dtype, up_weight.dtype, down_weight.dtype} != {x.dtype}:
        raise ValueError(
            f"x is {x.dtype}, gate_weight {gate_weight.dtype}, up_weight {up_weight.dtype} and "
            f"down_weight {down_weight.dtype}: they must be of one type"
        )
    if (
        x.shape[-1] != hidden
        or up_weight.shape != gate_weight.shape
        or down_weight.shape != (hidden, intermediate)
    ):
        raise ValueError(
            f"x {tuple(x.shape)}, gate_weight {tuple(gate_weight.shape)}, up_weight "
            f"{tuple(up_weight.shape)} and down_weight {tuple(down_weight.shape)} do not fit: "
            f"expected x [..., D], gate and up [F, D], down [D, F]"
        )
    tokens = x.numel() // hidden
    bytes_per_token = BACKWARD_INTERMEDIATES * intermediate * x.element_size()
    chunk = resolve_chunk_tokens(chunk_tokens, tokens, bytes_per_token, x.device)
    kept_2NF = next(iter(kept_here().handed(MLP, 1)), None)
    mlp = _GatedMLP(chunk, activation, kept_2NF)
    with autocast.off():
        return two_nodes(mlp, x, (gate_weight, up_weight, down_weight), values=values)


class _GatedMLP:
    """kept_2NF: gate and up, where they are handed over."""

    def __init__(self, chunk_tokens: int, activation: str, kept_2NF: Tensor | None) -> None:
        self._chunk_tokens = chunk_tokens
        self._activation = activation
        self._kept_2NF = kept_2NF  # not to be saved by autograd, which did not in the first run

    def forward(self, x_ND: Tensor, weights: Sequence[Tensor], y_ND: Tensor) -> None:
        gate_weight, up_weight, down_weight = weights
        tokens, features = x_ND.shape[0], gate_weight.shape[0]
        # Gate and up that are kept have room for all tokens, and their product has its own.
        keeping = MLP in kept_here().names
        both = self._kept_2NF
        if both is None:
            both = x_ND.new_empty(2, tokens if keeping else self._chunk_tokens, features)
        products = x_ND.new_empty(self._chunk_tokens, features) if keeping else both[0]
        for chunk in chunk_slices(tokens, self._chunk_tokens):
            x_CD = x_ND[chunk]
            rows = slice(x_CD.shape[0])
            gate_CF, up_CF = both[:, chunk if keeping else rows]
            if self._kept_2NF is None:
                torch.mm(x_CD, gate_weight.t(), out=gate_CF)
                torch.mm(x_CD, up_weight.t(), out=up_CF)
            product_CF = glu_forward(gate_CF, up_CF, self._activation, out=products[rows])
            torch.mm(product_CF, down_weight.t(), out=y_ND[chunk])
        if keeping:
            kept_here().record(MLP, (both,))

    def backward(
        self, dy_ND: Tensor, x_ND: Tensor, weights: Sequence[Tensor], needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        gate_weight, up_weight, down_weight = weights
        tokens = x_ND.shape[0]
        kept_2NF, self._kept_2NF = self._kept_2NF, None  # a second backward computes them
        x_needed, *weights_needed = needed
        gate_gradient, up_gradient, down_gradient = (
            WeightGradient(weight, needed=needed, several=tokens > self._chunk_tokens)
            for weight, needed in zip(
                (gate_weight, up_weight, down_weight), weights_needed, strict=True
            )
        )
        dx_ND = torch.empty_like(x_ND) if x_needed else None
        for chunk in chunk_slices(tokens, self._chunk_tokens):
            x_CD, dy_CD = x_ND[chunk], dy_ND[chunk]
            if kept_2NF is None:
                gate_CF, up_CF = x_CD @ gate_weight.t(), x_CD @ up_weight.t()
            else:  # what is kept may be read again
                gate_CF, up_CF = (kept_NF[chunk].clone() for kept_NF in kept_2NF)
            dproduct_CF = dy_CD @ down_weight
            glu_backward_(dproduct_CF, gate_CF, up_CF, self._activation)
            product_CF, dgate_CF, dup_CF = dproduct_CF, gate_CF, up_CF
            del dproduct_CF, gate_CF, up_CF
            # Each array goes before the next weight's gradient is made.
            down_gradient.add_product(dy_CD, product_CF)
            del product_CF
            if dx_ND is not None:
                torch.mm(dgate_CF, gate_weight, out=dx_ND[chunk])
            gate_gradient.add_product(dgate_CF, x_CD)
            del dgate_CF
            if dx_ND is not None:
                dx_ND[chunk].addmm_(dup_CF, up_weight)
            up_gradient.add_product(dup_CF, x_CD)
            del dup_CF
        return dx_ND, gate_gradient.result(), up_gradient.result(), down_gradient.result()
