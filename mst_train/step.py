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
from mst_train.model import Transformer
from mst_train.mst import Documents
from mst_train.optim import Optimizer


def train_step(
    model: Transformer,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    rate: float,
    max_grad_norm: float | None,
) -> tuple[float, float, int]:
    """One optimizer step over the micro-batches ``batches``, at learning rate ``rate``.

    The loss is the sum over the step's valid tokens divided by their number, so it does not depend
    on how the step is cut into micro-batches. Returns loss, gradient norm and number of tokens;
    raises TrainingError, which says how the weights are left, where loss or gradient is not finite.
    """
    device = model.embedding.weight.device
    valid_tokens = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    loss_sum = 0.0
    optimizer.begin_step(rate)
    for batch in batches:
        batch_loss_sum, _ = model(*_move(batch, device))
        loss_sum += batch_loss_sum.item()
        if not math.isfinite(loss_sum):  # checked here: the backward may update weights
            raise TrainingError(
                f"the loss is {loss_sum}: the weights were not updated. Continue from the last "
                f"checkpoint with {optimizer.remedies}"
            )
        (batch_loss_sum / valid_tokens).backward()
    norm = optimizer.gradient_norm()
    gradient_norm = norm.item()
    if not math.isfinite(gradient_norm):
        raise TrainingError(
            f"the gradient's norm is {gradient_norm}: {optimizer.after_bad_gradient}. Continue "
            f"from the last checkpoint with {optimizer.remedies}"
        )
    if max_grad_norm is not None:
        optimizer.clip(max_grad_norm, norm)
    optimizer.step()
    return loss_sum / valid_tokens, gradient_norm, sum(batch.tokens.numel() for batch in batches)


@torch.no_grad()
def evaluate(model: Transformer, batches: Iterable[Batch]) -> float:
    """The mean loss per valid token over all batches."""
    device = model.embedding.weight.device
    loss_sum, valid_tokens = 0.0, 0
    for batch in batches:
        batch_loss_sum, batch_valid_tokens = model(*_move(batch, device))
        loss_sum += batch_loss_sum.item()
        valid_tokens += int(batch_valid_tokens)
    return loss_sum / valid_tokens


def _move(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Documents | None]:
    """What the model takes, on its device."""
    documents = None if batch.boundaries is None else Documents(batch.boundaries)
    return (
        batch.tokens.to(device),
        batch.labels.to(device),
        batch.positions.to(device),
        documents,
    )
