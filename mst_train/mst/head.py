"""The LM head and its cross-entropy in mini-sequences.

The logits are the largest array of a training step: [N, V], with V = 128256 in Llama3. A token's
loss needs its own row alone, and the loss's gradient with respect to that row is known as soon as
the row is. So the forward goes through the tokens in chunks and computes, for each, the logits, the
losses, the gradient in the logits' own memory, and from it the gradients of the hidden states and
of the weight (the target's part of it separately, for precision). The backward has only to scale
them. One chunk of logits is ever alive, and nothing is computed twice (Mini-Sequence Transformer,
section 3.2).

Legend: N tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from mst_kernels import cross_entropy_
from mst_train.mst.accumulate import WeightGradient
from mst_train.mst.autocast import Autocast, check_tensors
from mst_train.mst.autograd import first_order_only
from mst_train.mst.chunking import chunk_slices, resolve_chunk_tokens


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same loss as one piece, the standard way: all logits at once, with an fp32 copy.

    Arguments and results as in ``mini_sequence_cross_entropy``.
    """
    _check(hidden, weight, labels)
    logits_NV = hidden @ weight.t()
    logits_NV = logits_NV.to(_loss_dtype(hidden))
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    loss_sum = torch.nn.functional.cross_entropy(
        logits_NV,
        labels,
        ignore_index=ignore_index,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    valid_N = labels != ignore_index
    if z_loss:
        log_sum_exp_N = torch.logsumexp(logits_NV, dim=-1)
        loss_sum = loss_sum + z_loss * (log_sum_exp_N.square() * valid_N).sum()
    return loss_sum, valid_N.sum()


def mini_sequence_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_tokens: int | str = "auto",
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropy over all valid tokens, with one chunk of logits alive.

    With z = hidden weight^T, s = softcap * tanh(z / softcap) (s = z without), L = logsumexp(s) and
    e = label_smoothing, a token of label y contributes

        (1 - e) (L - s_y) + e (L - mean(s)) + z_loss * L^2.

    Exact: the losses and all gradients are those of ``cross_entropy`` up to rounding, whatever the
    chunk size. The weight's gradient reaches autograd once.

    Args:
        hidden: [N, D], floating point.
        weight: [V, D] as in ``nn.Linear``, of hidden's type (autocast casts both).
        labels: [N] int64, already shifted: labels[i] is the token that hidden[i] predicts.
        chunk_tokens: tokens computed at a time; "auto" bounds the logits by bytes.
        ignore_index: the label of tokens that count for nothing.
        softcap: bound of the logits (Gemma-2).
        z_loss: weight of the squared log-sum-exp (PaLM, section 5).
        label_smoothing: in [0, 1].

    Returns:
        loss_sum: fp32 scalar (fp64 for fp64 input), differentiable, to be divided by the number of
            valid tokens of the whole step.
        valid_tokens: int64 scalar, on hidden's device.

    Raises:
        ValueError: shapes that do not fit each other, an unusable chunk size.
        TypeError: a module in the place of its weight.
        RuntimeError: a second backward through the same result (its gradients are gone).

    Memory: one chunk of logits, and until the backward the gradients of hidden and weight; the
    weight's in fp32 until then, and on a CPU, where several chunks of bf16 or fp16 add up, beside
    it the product of the chunk that is added, [V, D] in their own type. Under ``torch.no_grad``, or
    where neither input needs a gradient, no gradient is computed or held.
    """
    check_tensors(hidden=hidden, weight=weight, labels=labels)
    autocast = Autocast.here(hidden.device)
    hidden, weight = autocast.cast(hidden), autocast.cast(weight)
    chunk = _chunk_size(hidden, weight, labels, chunk_tokens)
    # Grad mode is always off inside a Function's forward, so it is read here.
    gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    options = {
        "ignore_index": ignore_index,
        "softcap": softcap,
        "z_loss": z_loss,
        "label_smoothing": label_smoothing,
        "gradient": gradient,
    }
    with autocast.off():
        loss_sum: Tensor = _MiniSequenceCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, weight, labels, chunk, options
        )
    return loss_sum, (labels != ignore_index).sum()


@torch.no_grad()
def mini_sequence_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_tokens: int | str = "auto",
    ignore_index: int = -100,
    softcap: float | None = None,
) -> Tensor:
    """The cross-entropy of each token, [N], without gradients and with one chunk of logits alive.

    Arguments and errors as in ``mini_sequence_cross_entropy``, which gives the sum of these losses.
    They are fp32 (fp64 for fp64 input), and 0 where the label is ``ignore_index``.
    """
    check_tensors(hidden=hidden, weight=weight, labels=labels)
    autocast = Autocast.here(hidden.device)
    hidden, weight = autocast.cast(hidden), autocast.cast(weight)
    chunk_size = _chunk_size(hidden, weight, labels, chunk_tokens)
    options = {"ignore_index": ignore_index, "softcap": softcap, "gradient": False}
    loss_N = hidden.new_empty(hidden.shape[0], dtype=_loss_dtype(hidden))
    logits = hidden.new_empty(chunk_size, weight.shape[0])
    with autocast.off():
        for chunk in chunk_slices(hidden.shape[0], chunk_size):
            hidden_CD = hidden[chunk]
            logits_CV = logits[: hidden_CD.shape[0]]
            torch.mm(hidden_CD, weight.t(), out=logits_CV)
            loss_N[chunk], _ = cross_entropy_(logits_CV, labels[chunk], **options)  # type: ignore[arg-type]
    return loss_N


class _MiniSequenceCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        chunk_tokens: int,
        options: dict,  # type: ignore[type-arg]
    ) -> Tensor:
        tokens = hidden_ND.shape[0]
        hidden_needed, weight_needed = (
            options["gradient"] and needed
            for needed in ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        )
        # Even one chunk adds two parts: its product, and that of its targets.
        weight_gradient = WeightGradient(weight_VD, needed=weight_needed, several=True)
        dhidden_ND = torch.empty_like(hidden_ND) if hidden_needed else None
        # Summed once at the end, so that the loss does not depend on the chunk size.
        loss_N = hidden_ND.new_empty(tokens, dtype=_loss_dtype(hidden_ND))
        logits = hidden_ND.new_empty(chunk_tokens, weight_VD.shape[0])
        for chunk in chunk_slices(tokens, chunk_tokens):
            hidden_CD, labels_C = hidden_ND[chunk], labels_N[chunk]
            logits_CV = logits[: hidden_CD.shape[0]]
            torch.mm(hidden_CD, weight_VD.t(), out=logits_CV)
            loss_N[chunk], target_parts_C = cross_entropy_(logits_CV, labels_C, **options)
            if target_parts_C is None:
                continue
            dlogits_CV = logits_CV
            targets_C = labels_C.masked_fill(labels_C == options["ignore_index"], 0)
            weight_gradient.add_product(dlogits_CV, hidden_CD)
            weight_gradient.add_rows(targets_C, target_parts_C, hidden_CD)
            if dhidden_ND is not None:
                dhidden_CD = torch.mm(dlogits_CV, weight_VD, out=dhidden_ND[chunk])
                dhidden_CD += target_parts_C[:, None] * weight_VD[targets_C]
        ctx.gradients = (dhidden_ND, weight_gradient)  # type: ignore[attr-defined]
        return loss_N.sum()

    @staticmethod
    @first_order_only
    def backward(ctx, scale):  # type: ignore[no-untyped-def]
        if ctx.gradients is None:
            raise RuntimeError(
                "a second backward through mini_sequence_cross_entropy: its gradients were all "
                "handed over in the first. Ask for all of them at once, or run the forward again"
            )
        dhidden_ND, weight_gradient = ctx.gradients
        ctx.gradients = None
        if dhidden_ND is not None:
            dhidden_ND *= scale
        return dhidden_ND, weight_gradient.result(scale), None, None, None


def _loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _chunk_size(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int | str) -> int:
    """``chunk_tokens`` as a number; ValueError for inputs that do not fit each other."""
    _check(hidden, weight, labels)
    bytes_per_token = weight.shape[0] * hidden.element_size()
    return resolve_chunk_tokens(chunk_tokens, hidden.shape[0], bytes_per_token, hidden.device)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: give one type")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit: expected "
            f"[N, D] and [V, D]"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit hidden {tuple(hidden.shape)}: expected "
            f"[{hidden.shape[0]}]"
        )
