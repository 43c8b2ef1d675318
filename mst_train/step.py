"""One optimizer step, and the loss without one.

train_step   forward, backward and update over a step's micro-batches
evaluate     the validation loss
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mst_train.data import IGNORED, Batch
from mst_train.errors import TrainingError
from mst_train.evaluate.positions import PositionLosses, ValidationLoss
from mst_train.model import Transformer
from mst_train.mst import Documents
from mst_train.optim import Optimizer


class BadStep(TrainingError):
    """A step whose loss or gradient is not finite, or whose loss is above its limit.

    Attributes:
        reason: what was seen.
        remedies: what to change.
        can_skip: weights and optimizer states are as before the step and its gradients are
            forgotten, so that training can go on with other data.
    """

    def __init__(self, reason: str, consequence: str, remedies: str, *, can_skip: bool) -> None:
        self.reason, self.remedies, self.can_skip = reason, remedies, can_skip
        skipping = ", or leave such steps out with train.bad_step=skip" if can_skip else ""
        super().__init__(
            f"{reason}: {consequence}. Continue from the last checkpoint with {remedies}{skipping}"
        )


def train_step(
    model: Transformer,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    rate: float,
    max_grad_norm: float | None,
    loss_limit: float = math.inf,
) -> tuple[float, float, int]:
    """One optimizer step over the micro-batches ``batches``, at learning rate ``rate``.

    The loss is the sum over the step's valid tokens divided by their number, so it does not depend
    on how the step is cut into micro-batches. Returns loss, gradient norm and number of tokens;
    raises BadStep, which says how the weights are left, where loss or gradient is not finite or the
    loss is above ``loss_limit``.
    """
    device = model.embedding.weight.device
    valid_tokens = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    loss_sum = 0.0
    optimizer.begin_step(rate)
    for batch in batches:
        batch_loss_sum, _ = model(*_move(batch, device))
        loss_sum += batch_loss_sum.item()
        # Checked here, because the backward may update weights. No token's loss is negative, so a
        # part of the step above the limit is enough.
        if not math.isfinite(loss_sum) or loss_sum > loss_limit * valid_tokens:
            optimizer.abandon_step()
            raise _bad_loss(loss_sum, valid_tokens, loss_limit, optimizer)
        (batch_loss_sum / valid_tokens).backward()
    norm = optimizer.gradient_norm()
    gradient_norm = norm.item()
    if not math.isfinite(gradient_norm):
        if optimizer.survives_bad_gradient:
            optimizer.abandon_step()
        raise BadStep(
            f"the gradient's norm is {gradient_norm}",
            optimizer.after_bad_gradient,
            optimizer.remedies,
            can_skip=optimizer.survives_bad_gradient,
        )
    if max_grad_norm is not None:
        optimizer.clip(max_grad_norm, norm)
    optimizer.step()
    return loss_sum / valid_tokens, gradient_norm, sum(batch.tokens.numel() for batch in batches)


@torch.no_grad()
def evaluate(model: Transformer, batches: Iterable[Batch]) -> ValidationLoss:
    """The mean loss per valid token over all batches, and by position in the sequence."""
    device = model.embedding.weight.device
    losses = PositionLosses(device)
    for batch in batches:
        tokens, labels, positions, documents = _move(batch, device)
        losses_BS = model.token_losses(tokens, labels, positions, documents)
        losses.add(losses_BS, labels != IGNORED, positions)
    return losses.result()


def _bad_loss(
    loss_sum: float, valid_tokens: int, loss_limit: float, optimizer: Optimizer
) -> BadStep:
    if math.isfinite(loss_sum):
        reason = (
            f"the loss reached {loss_sum / valid_tokens:.4g}, a spike: above {loss_limit:.4g}, "
            f"which is train.spike_factor times the median of the steps before"
        )
    else:
        reason = f"the loss is {loss_sum}"
    return BadStep(reason, "the weights were not updated", optimizer.remedies, can_skip=True)


def _move(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Documents | None]:
    """What the model takes, on its device."""
    documents = None if batch.boundaries is None else Documents(batch.boundaries)
    return (
        batch.tokens.to(device),
        batch.labels.to(device),
        batch.positions.to(device),
        documents,
    )
