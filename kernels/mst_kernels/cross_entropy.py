"""Cross-entropy of one row of logits per token, with its gradient written over the logits.

For each row x with target y and smoothing e, with s = softcap * tanh(x / softcap) where there is a
soft-cap and s = x where there is none, and L = logsumexp(s):

    loss = (1 - e) (L - s_y) + e (L - mean(s)) + z_loss L^2

    dloss/ds_j = softmax(s)_j (1 + 2 z_loss L) - (1 - e) [j = y] - e / V
    ds_j/dx_j  = 1 - (s_j / softcap)^2

The target's own part, t = -(1 - e) ds_y/dx_y in column y, is given apart. It is about 1, and every
other entry about 1/V: added up in one product, the many are rounded away against the one (in fp32
that is up to 13 times the error, and bf16 loses the rest of column y altogether). The caller adds t
times a row of the weight, and t times the hidden state to a row of the weight's gradient. Where the
target has half of the probability or more, both parts of column y nearly cancel: it is written as a
whole then, and t is 0.

Sources: z-loss, PaLM (Chowdhery et al., 2022), section 5; soft-capping, Gemma 2 (2024), section 2.

Legend: N tokens, V vocabulary.
"""

import torch

from mst_kernels.backend import use_triton
from mst_kernels.row_blocks import row_blocks

_INTEGER_OF_SIZE = {4: torch.int32, 8: torch.int64}


def cross_entropy_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    gradient: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss of each row, and in place over the logits its gradient but for the target's part.

    logits: [N, V] in bf16, fp16, fp32 or fp64, any stride between rows. labels: [N] int64. Returns
    the losses [N] and the targets' parts t [N], both in fp32 (fp64 for fp64 logits) and 0 where the
    label is `ignore_index`.

    With gradient=True, each row of `logits` is overwritten with the gradient of its own loss less t
    in the label's column: zeros where ignored, even if that row held inf or nan. With
    gradient=False the logits are left as they were, and t is None. Statistics are fp32 whatever the
    dtype of the logits (fp64 for fp64).

    Not differentiable. Nothing here waits for the device. A label outside [0, V) that is not
    `ignore_index` is the caller's error: torch may raise an error of its own, Triton gives that row
    a loss without target. Raises ValueError for wrong shapes or options.

    Memory: the losses. With torch also one block of rows in fp32 where the logits are 16 bits wide,
    or capped, or to be left alone (two where capped).
    """
    _check(logits, labels, softcap, label_smoothing)
    if use_triton(logits):
        from mst_kernels.cross_entropy_triton import cross_entropy_triton as run
    else:
        run = _cross_entropy_torch
    return run(logits, labels, ignore_index, softcap, z_loss, label_smoothing, gradient)


def _check(
    logits: torch.Tensor, labels: torch.Tensor, softcap: float | None, label_smoothing: float
) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "cross-entropy needs logits [N, V] and labels [N], but got "
            f"{list(logits.shape)} and {list(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"cross-entropy needs int64 labels, but got {labels.dtype}")
    if logits.shape[1] == 0:
        raise ValueError("cross-entropy needs a vocabulary of at least one token")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive or None, but is {softcap}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], but is {label_smoothing}")


def _statistics_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# --- torch ---------------------------------------------------------------------------------------


def _cross_entropy_torch(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    N, V = logits.shape
    dtype = _statistics_dtype(logits)
    losses = torch.empty(N, dtype=dtype, device=logits.device)
    target_parts = torch.empty_like(losses) if gradient else None
    ignored_N1 = (labels == ignore_index)[:, None]
    targets_N1 = labels[:, None].masked_fill(ignored_N1, 0)

    for rows in row_blocks(logits, N, V):
        block, ignored, target = logits[rows], ignored_N1[rows], targets_N1[rows]
        scores = block.to(dtype)
        capped = None
        if softcap is not None:
            capped = (scores / softcap).tanh_()
            scores = capped * softcap

        top = scores.amax(1, keepdim=True)
        target_score = scores.gather(1, target)
        mean_score = scores.mean(1, keepdim=True) if label_smoothing else None

        keep = scores is block and not gradient
        probabilities = scores.softmax(1) if keep else torch.softmax(scores, 1, out=scores)
        # torch.softmax is the fastest way to the exponentials, but adds them up plainly: over 128K
        # of them its denominator is off by 1e-5 in fp32. The sum of what it returns (1, but for
        # that) corrects it. The largest probability is exp(top - L), never much below 1 / V.
        total = probabilities.sum(1, keepdim=True)
        lse = top - (probabilities.amax(1, keepdim=True) / total).log()

        loss = lse - target_score
        if mean_score is not None:
            loss += label_smoothing * (target_score - mean_score)
        if z_loss:
            loss += z_loss * lse.square()
        losses[rows] = loss.masked_fill_(ignored, 0.0).squeeze(1)
        if target_parts is None:
            continue

        inside = (target_score - lse).exp_() >= 0.5
        part = (label_smoothing - 1.0) * inside.logical_not().to(dtype)
        left = label_smoothing - 1.0 - part
        if capped is not None:
            part = part * (1.0 - capped.gather(1, target).square())
        target_parts[rows] = part.masked_fill(ignored, 0.0).squeeze(1)

        probabilities.mul_((1.0 + 2.0 * z_loss * lse) / total)
        probabilities.scatter_add_(1, target, left)
        if label_smoothing:
            probabilities.sub_(label_smoothing / V)
        if capped is not None:
            probabilities.mul_(capped.square_().neg_().add_(1.0))
        _zero_rows_(probabilities, ignored)
        if probabilities is not block:
            block.copy_(probabilities)
    return losses, target_parts


def _zero_rows_(values: torch.Tensor, where: torch.Tensor) -> None:
    """Zero the rows [R, V] that `where` [R, 1] names, NaN included.

    Clearing bits costs a tenth of masked_fill_ on a CPU, and unlike a product it clears NaN too.
    """
    integer = _INTEGER_OF_SIZE[values.element_size()]
    values.view(integer).bitwise_and_(where.to(integer) - 1)
