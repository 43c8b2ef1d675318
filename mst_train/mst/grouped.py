"""Products of tokens with the matrices of the experts that they are sent to.

The pairs of a token and one of its experts are sorted by expert, so that an expert's are rows that
follow each other, and nothing is padded. No array's size depends on how many go where.

Legend: C tokens, E experts, K experts of a token, G = C*K pairs, sorted; I and O a matrix's sizes.
"""

import functools
import logging
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_train.mst.accumulate import WeightGradient, on_cuda

log = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
ALIGNMENT = 16
"""Bytes of which torch's grouped product wants rows to be multiples."""


class Pairs:
    """Tokens and their experts, sorted by expert.

    token_G, expert_G: each pair's. order_G: its place among the pairs of token after token.
    place_CK: where a token's pairs are.
    """

    def __init__(self, indices_CK: Tensor, experts: int) -> None:
        chosen_G = indices_CK.flatten()
        order_G = torch.argsort(chosen_G, stable=True)
        self.order_G, self.expert_G = order_G, chosen_G[order_G]
        self.token_G = order_G.div(indices_CK.shape[1], rounding_mode="floor")
        self.place_CK = torch.argsort(order_G).view_as(indices_CK)
        self._counts_E = torch.zeros(experts, dtype=torch.int64, device=chosen_G.device)
        self._counts_E.scatter_add_(0, chosen_G, torch.ones_like(chosen_G))
        self._ends_E = self._counts_E.cumsum(0).to(torch.int32)
        self._rows: list[slice] | None = None

    def products(
        self,
        x_GI: Tensor,
        weight_EIO: Tensor,
        bias_EO: Tensor | None = None,
        *,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """Each row times its expert's matrix, [G, O], with its bias; added to ``add_to``, which is
        it then."""
        if bias_EO is not None:
            return self.products(x_GI, weight_EIO).add_(bias_EO[self.expert_G])
        if _has_grouped_product(x_GI, weight_EIO):
            y: Tensor = F.grouped_mm(x_GI, weight_EIO, offs=self._ends_E)
            return y if add_to is None else add_to.add_(y)
        y = x_GI.new_empty(x_GI.shape[0], weight_EIO.shape[-1]) if add_to is None else add_to
        for expert, rows in self._experts():
            if add_to is None:
                torch.mm(x_GI[rows], weight_EIO[expert], out=y[rows])
            else:
                y[rows].addmm_(x_GI[rows], weight_EIO[expert])
        return y

    def _experts(self) -> Iterator[tuple[int, slice]]:
        """Those that have rows, and which."""
        if self._rows is None:
            self._rows = list(_slices(self._counted()))
        return ((n, rows) for n, rows in enumerate(self._rows) if rows.stop > rows.start)

    def _counted(self) -> Sequence[int]:
        """Rows of each expert; as even as they can be where there is no data."""
        if not self._counts_E.is_meta:
            counts: list[int] = self._counts_E.tolist()
            return counts
        pairs, experts = self.token_G.numel(), self._counts_E.numel()
        return [(n + 1) * pairs // experts - n * pairs // experts for n in range(experts)]


class ExpertsGradient:
    """The gradient of one weight of all experts, [E, O, I], summed over chunks (accumulate.py)."""

    def __init__(self, weight_EOI: Tensor, *, several: bool, needed: bool) -> None:
        self.needed = needed
        self._whole = WeightGradient(weight_EOI, several=several, needed=needed)
        self._parts: list[WeightGradient] = []

    def add_products(self, dy_GO: Tensor, x_GI: Tensor, pairs: Pairs) -> None:
        """Add dy^T x of each expert's rows."""
        if not self.needed:
            return
        if _has_grouped_product(dy_GO, x_GI):
            self._whole.add(F.grouped_mm(dy_GO.t(), x_GI, offs=pairs._ends_E))
            return
        if not self._parts:
            self._parts = self._whole.parts()
        for expert, rows in pairs._experts():
            self._parts[expert].add_product(dy_GO[rows], x_GI[rows])

    def result(self) -> Tensor | None:
        """In the weight's type; None where not needed."""
        self._parts = []
        return self._whole.result()


def _has_grouped_product(left: Tensor, right: Tensor) -> bool:
    """Whether one call of torch's does the products of all experts."""
    sizes = (left.shape[-1], *right.shape[1:])
    if left.dtype not in HALF or any(n * left.element_size() % ALIGNMENT for n in sizes):
        return False
    return on_cuda(left) and (left.is_meta or _grouped_product_works(left.device, left.dtype))


@functools.cache
def _grouped_product_works(device: torch.device, dtype: torch.dtype) -> bool:
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    ends = torch.tensor([0, 16], dtype=torch.int32, device=device)
    try:
        products = F.grouped_mm(ones, ones.expand(2, 16, 16).contiguous(), offs=ends)
        gradients = F.grouped_mm(ones.t(), ones, offs=ends)
        right = [(products == 16).all(), (gradients[1] == 16).all(), (gradients[0] == 0).all()]
        return all(map(bool, right))
    except (AttributeError, RuntimeError) as error:
        log.warning(
            "this torch has no grouped products of %s (%s): experts are computed one by one",
            dtype,
            str(error).partition("\n")[0],
        )
        return False


def _slices(counts: Sequence[int]) -> Iterator[slice]:
    end = 0
    for count in counts:
        yield slice(end, end + count)
        end += count
