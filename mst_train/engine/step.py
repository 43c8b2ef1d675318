"""One optimizer step, and the loss without one.

train_step   forward, backward and update over a step's micro-batches
evaluate     the validation loss
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mst_train.data import IGNORED, Batch
from mst_train.distributed import Topology
from mst_train.engine import Engine
from mst_train.engine.positions import PositionLosses, ValidationLoss
from mst_train.errors import TrainingError
from mst_train.model import Transformer
from mst_train.mst import Documents


class BadStep(TrainingError):
    """A step without a loss, or whose loss or gradient is not finite, or is above its limit.

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
    engine: Engine,
    batches: Sequence[Batch],
    rate: float,
    max_grad_norm: float | None,
    loss_limit: float = math.inf,
) -> tuple[float, float, int]:
    """One optimizer step over the micro-batches ``batches``, at learning rate ``rate``.

    Of several processes, each is given its own part of the sequences, and all return or raise
    the same.

    The loss is the sum over the step's valid tokens divided by their number, so it does not depend
    on how the step is cut into micro-batches and shared by processes. Returns loss, gradient norm
    and number of tokens; raises BadStep, which says how the weights are left, where loss or
    gradient is not finite, the loss is above ``loss_limit``, or no token has a label.
    """
    topology = engine.topology
    tokens, valid_tokens = (
        int(number)
        for number in topology.total(
            [
                sum(batch.tokens.numel() for batch in batches),
                sum(int((batch.labels != IGNORED).sum()) for batch in batches),
            ]
        )
    )
    if not valid_tokens:
        raise BadStep(
            f"none of the step's {tokens:,} tokens has a label, so it has no loss",
            "the weights were not updated",
            "data that have labels",
            can_skip=True,
        )
    loss_sum = torch.zeros((), dtype=torch.float64, device=topology.device)
    engine.set_learning_rate(rate)
    for index, batch in enumerate(batches):
        batch_loss_sum, _ = engine(*_move(batch, topology.device))
        loss_sum += batch_loss_sum.detach()
        last = index == len(batches) - 1
        if last:
            topology.sum_([loss_sum])
        if not engine.survives_bad_gradient:  # its backward updates weights, and is the step's only
            _require_good(loss_sum.item(), valid_tokens, loss_limit, engine)
        engine.backward(batch_loss_sum / valid_tokens, last=last)
    norm = engine.gradient_norm()
    # The device is waited for here alone.
    total, gradient_norm = torch.stack([loss_sum, norm.to(loss_sum)]).tolist()
    _require_good(total, valid_tokens, loss_limit, engine)
    if not math.isfinite(gradient_norm):
        if engine.survives_bad_gradient:
            engine.zero_grad()
        raise BadStep(
            f"the gradient's norm is {gradient_norm}",
            engine.after_bad_gradient,
            engine.remedies,
            can_skip=engine.survives_bad_gradient,
        )
    if max_grad_norm is not None:
        engine.clip(max_grad_norm, norm)
    engine.step()
    return total / valid_tokens, gradient_norm, tokens


@torch.no_grad()
def evaluate(
    model: Transformer, batches: Iterable[Batch], topology: Topology | None = None
) -> ValidationLoss:
    """The mean loss per valid token over all batches, and by position in the sequence.

    Several processes share the work; each is given all batches, and returns the same. Raises
    TrainingError where no token has a label.
    """
    topology = topology or Topology(device=model.embedding.weight.device)
    losses = PositionLosses(topology.device)
    for batch in topology.shared(batches):
        tokens, labels, positions, documents = _move(batch, topology.device)
        losses_BS = model.token_losses(tokens, labels, positions, documents)
        losses.add(losses_BS, labels != IGNORED, positions)
    topology.sum_([losses.sums])
    result = losses.result()
    if not result.buckets:
        raise TrainingError("none of the validation data's tokens has a label: there is no loss")
    return result


def _require_good(loss_sum: float, valid_tokens: int, loss_limit: float, engine: Engine) -> None:
    """Raises BadStep, before the weights are updated, for a loss that is not finite or a spike."""
    if math.isfinite(loss_sum) and loss_sum <= loss_limit * valid_tokens:
        return
    engine.zero_grad()
    reason = f"the loss is {loss_sum}"
    if math.isfinite(loss_sum):
        reason = (
            f"the loss reached {loss_sum / valid_tokens:.4g}, a spike: above {loss_limit:.4g}, "
            f"which is train.spike_factor times the median of the steps before"
        )
    raise BadStep(reason, "the weights were not updated", engine.remedies, can_skip=True)


def _move(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Documents | None]:
    """What the model takes, on its device; nobody waits for it to arrive."""
    documents = None if batch.cu_seqlens is None else Documents(batch.cu_seqlens)
    tokens, labels, positions = (
        # A copy out of other memory would wait for all that the device has still to do.
        (t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True)
        for t in (batch.tokens, batch.labels, batch.positions)
    )
    return tokens, labels, positions, documents
