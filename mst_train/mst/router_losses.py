"""What keeps experts evenly used: losses of the routers' logits, over all blocks and tokens.

    balance   E * sum_e f_e p_e                    (Fedus et al. 2022, equation 4)
    z         mean(logsumexp(logits)^2)            (Zoph et al. 2022, equation 5)

f_e is the mean number of times that a token in a block is sent to expert e (K in all), p_e the mean
probability that it is given; both, as z, over the tokens of a batch's sequences and all blocks, as
transformers takes them.

Blocks run in chunks, and again in the backward. So they add what they find to sums as they run for
the first time, which are the same sums whatever the chunks, and the loss's gradient is added to the
logits' where they are rebuilt: it needs f and the logits alone, and by then f is known.

Legend: N tokens, E experts, K experts of a token.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor


class RouterLosses:
    """The losses of one forward's routers.

    balance, z: their coefficients.
    """

    def __init__(self, experts: int, device: torch.device, balance: float, z: float) -> None:
        self._balance, self._z = balance, z
        # Times that each expert was chosen, sums of its probabilities, of z, and tokens times
        # blocks.
        self._sums = torch.zeros(2 * experts + 2, dtype=torch.float64, device=device)
        self._experts = experts
        self._scale: Tensor | None = None

    @property
    def load_E(self) -> Tensor:
        """The share of tokens and choices that each expert gets, fp64; sums to 1."""
        counts_E = self._sums[: self._experts]
        return counts_E / counts_E.sum()

    def record(self, logits_NE: Tensor, indices_NK: Tensor) -> None:
        """Add what one router gave to some tokens."""
        counts_E, probabilities_E = self._sums[:-2].view(2, -1)
        ones = torch.ones_like(indices_NK, dtype=torch.float64)
        counts_E.scatter_add_(0, indices_NK.flatten(), ones.flatten())
        logits_NE = _wide(logits_NE.detach())
        probabilities_E += torch.softmax(logits_NE, -1).sum(0)
        self._sums[-2] += logits_NE.logsumexp(-1).square().sum()
        self._sums[-1] += logits_NE.shape[0]

    def added(
        self,
        loss_sum: Tensor,
        valid_tokens: Tensor,
        sum_over_sequence: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """A batch's ``loss_sum`` with these losses: once for each token that has a label, so that
        they stand beside the mean loss.

        sum_over_sequence: gives the sum of a tensor over the processes that share the sequences,
            all of which call this together.
        """
        both = torch.cat([self._sums, valid_tokens.to(self._sums)[None]])
        if sum_over_sequence is not None:
            both = sum_over_sequence(both)
        self._sums, of_sequences = both[:-1], both[-1]
        rows = self._sums[-1]
        counts_E, probabilities_E = self._sums[:-2].view(2, -1) / rows
        balance = self._experts * (counts_E * probabilities_E).sum()
        loss = self._balance * balance + self._z * self._sums[-2] / rows
        total: Tensor = _Added.apply(  # type: ignore[no-untyped-call]
            loss_sum, (loss * valid_tokens).to(loss_sum), of_sequences, self
        )
        return total

    def observed(self, logits_NE: Tensor) -> Tensor:
        """The same logits, whose gradient has that of these losses too."""
        if not (self._balance or self._z):
            return logits_NE
        y: Tensor = _Observed.apply(logits_NE, self)  # type: ignore[no-untyped-call]
        return y

    def gradient(self, logits_NE: Tensor) -> Tensor:
        """These losses' gradient, once that of the whole loss is known."""
        if self._scale is None:
            raise RuntimeError(
                "the routers' losses are not part of the loss: only its forward adds them"
            )
        rows, logits_NE = self._sums[-1], _wide(logits_NE)
        probabilities_NE = torch.softmax(logits_NE, -1)
        wanted_E = self._balance * self._experts / rows**2 * self._sums[: self._experts]
        wanted_E = wanted_E.to(probabilities_NE)
        expected_N1 = (probabilities_NE * wanted_E).sum(-1, keepdim=True)
        z_N1 = 2 * self._z / rows * logits_NE.logsumexp(-1, keepdim=True)
        return (self._scale * probabilities_NE * (wanted_E - expected_N1 + z_N1)).to(logits_NE)


_Here = tuple[RouterLosses | None, bool]
_here: ContextVar[_Here] = ContextVar("router_losses", default=(None, False))


class _In:
    """A context that may be entered again once it was left: a graph may have several backwards."""

    def __init__(self, here: _Here) -> None:
        self._value = here
        self._tokens: list[Token[_Here]] = []

    def __enter__(self) -> None:
        self._tokens.append(_here.set(self._value))

    def __exit__(self, *_: object) -> None:
        _here.reset(self._tokens.pop())


def first(losses: RouterLosses | None) -> AbstractContextManager[None]:
    """The context in which blocks run for the first time."""
    return _In((losses, True))


def again(losses: RouterLosses | None) -> AbstractContextManager[None]:
    """The context in which they run again, in the backward."""
    return _In((losses, False))


def router_losses_here() -> _Here:
    """The losses of the present context, and whether blocks run for the first time."""
    return _here.get()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _Observed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NE: Tensor, losses: RouterLosses) -> Tensor:
        ctx.save_for_backward(logits_NE)
        ctx.losses = losses
        return logits_NE.view_as(logits_NE)

    @staticmethod
    def backward(ctx: Any, dlogits_NE: Tensor) -> tuple[Tensor, None]:
        (logits_NE,) = ctx.saved_tensors
        return dlogits_NE + ctx.losses.gradient(logits_NE).to(dlogits_NE), None


class _Added(torch.autograd.Function):
    """Adds; in the backward the losses hear of the gradient before any router's logits do."""

    @staticmethod
    def forward(
        ctx: Any, loss_sum: Tensor, more: Tensor, valid_tokens: Tensor, losses: RouterLosses
    ) -> Tensor:
        ctx.losses, ctx.valid_tokens = losses, valid_tokens
        return loss_sum + more

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        ctx.losses._scale = dloss.to(ctx.valid_tokens) * ctx.valid_tokens
        return dloss, None, None, None
