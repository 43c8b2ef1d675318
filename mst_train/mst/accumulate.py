"""The sum of a weight's gradient over chunks."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_simulated: ContextVar[str | None] = ContextVar("simulated_device", default=None)


@contextmanager
def simulated_device(kind: str) -> Iterator[None]:
    """In this context tensors without data take the memory that they would take on such a device:
    "cuda" or "cpu".
    """
    token = _simulated.set(kind)
    try:
        yield
    finally:
        _simulated.reset(token)


def on_cuda(like: Tensor) -> bool:
    """Whether a tensor is on a CUDA device, or without data in the place of one that is."""
    return _simulated.get() == "cuda" if like.is_meta else like.is_cuda


def _adds_products_in_fp32(like: Tensor) -> bool:
    """Whether products of bf16 or fp16 tensors can be had, and added up, in fp32 alone."""
    return on_cuda(like) and (like.is_meta or _products_in_fp32_work(like.device, like.dtype))


@functools.cache
def _products_in_fp32_work(device: torch.device, dtype: torch.dtype) -> bool:
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        total = torch.mm(ones, ones, out_dtype=torch.float32)
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
        return bool((total == 32).all())
    except (RuntimeError, TypeError) as error:
        log.warning(
            "this torch adds no products of %s to fp32 sums (%s): weight gradients take one more "
            "array of the weight's shape",
            dtype,
            str(error).partition("\n")[0],
        )
        return False


def wide_zeros(like: Tensor) -> Tensor:
    """Of ``like``'s shape, for a sum: in fp32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)


class WeightGradient:
    """The gradient of one weight, summed over the chunks of a mini-sequence loop.

    The sum is kept in fp32 for bf16 and fp16 weights (in their own type for fp32 and fp64): in
    bf16, every chunk added would round away up to 2^-9 of all that is there already. On CUDA
    ``add_product``'s products are never in bf16 or fp16 at all, nor beside the sum.

    Holds one array of the weight's shape, or nothing where the gradient is not ``needed``.

    several: whether more than one chunk is added; one has nothing to be added to, and is the
    gradient as it is.
    """

    def __init__(self, weight: Tensor, *, several: bool, needed: bool = True) -> None:
        self.needed = needed
        self._weight = weight
        self._several = several
        low_precision = weight.dtype in (torch.bfloat16, torch.float16)
        self._dtype = torch.float32 if several and low_precision else weight.dtype
        self._total: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Add a gradient that others may read too."""
        if self._total is None:
            self._total = gradient.to(self._dtype, copy=self._several)
        elif self._several:
            self._total += gradient
        else:
            self._total = self._total + gradient

    def add_product(self, output_gradient_NO: Tensor, input_NI: Tensor) -> None:
        """Add dy^T x, [out, in]: what a chunk of a linear layer y = x W^T gives."""
        if not self.needed:
            return
        left_ON, total = output_gradient_NO.t(), self._total
        if self._dtype == input_NI.dtype:
            self._total = left_ON @ input_NI if total is None else total.addmm_(left_ON, input_NI)
        elif _adds_products_in_fp32(input_NI):
            if total is None:
                self._total = torch.mm(left_ON, input_NI, out_dtype=self._dtype)
            elif total.is_meta:  # torch 2.11 does not know the shape of what is below
                total.addmm_(left_ON, input_NI)
            else:
                torch.addmm(total, left_ON, input_NI, out_dtype=self._dtype, out=total)
        else:
            product_OI = left_ON @ input_NI
            self._total = product_OI.to(self._dtype) if total is None else total.add_(product_OI)

    def parts(self) -> list["WeightGradient"]:
        """The gradients of the weight's matrices, [E, out, in], one by one: what is added to them
        is added to this, and they are done with before it gives its ``result``."""
        if self._total is None:
            self._total = torch.zeros_like(self._weight, dtype=self._dtype)
        parts = []
        for weight_OI, total_OI in zip(self._weight, self._total, strict=True):
            parts.append(WeightGradient(weight_OI, several=self._several))
            parts[-1]._total = total_OI
        return parts

    def add_rows(self, rows_N: Tensor, factor_N: Tensor, input_NI: Tensor) -> None:
        """Add factor[n] * input[n] to row rows[n] of the gradient, for every n."""
        if self._total is not None:
            terms_NI = (factor_N[:, None] * input_NI).to(self._total.dtype)
            # A row may come several times. Of torch's two ways to add rows, each is done in a fixed
            # order on one kind of device alone, and a run has to repeat itself to the last bit.
            if self._total.device.type == "cpu":
                self._total.index_add_(0, rows_N, terms_NI)
            else:
                self._total.index_put_((rows_N,), terms_NI, accumulate=True)

    def result(self, scale: Tensor | None = None) -> Tensor | None:
        """The gradient, times ``scale`` if given, in the weight's type; None where not needed."""
        if not self.needed:
            return None
        if self._total is None:  # there were no tokens
            return torch.zeros_like(self._weight)
        total, self._total = self._total, None
        if scale is not None:
            total *= scale  # before it is rounded, and before fp16 could overflow
        return total.to(self._weight.dtype)
