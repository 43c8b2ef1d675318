"""The LM head and the loss of a transformers model, in mini-sequences.

The head is called, since it may be that its weight is whole in its own call alone (ZeRO-3, FSDP,
offloading). With labels it gives the sum of the losses in the logits' place.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mst_train.integrations.huggingface.calls import BASE, altered
from mst_train.mst import mini_sequence_cross_entropy
from mst_train.mst.chunking import chunk_slices, resolve_chunk_tokens


def head_forward(base: Any) -> Any:
    def forward(self: Any, hidden: Tensor, labels_N: Tensor | None = None, **loss: Any) -> Tensor:
        if labels_N is None:
            return base.forward(self, hidden)
        hidden, labels_N = hidden.to(self.weight.device), labels_N.to(self.weight.device)
        loss_sum, _ = mini_sequence_cross_entropy(hidden, self.weight, labels_N, **loss)
        return loss_sum

    return forward


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    logits, softcap = model.lm_head(hidden), _softcap(model)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def loss_of(
    model: Any,
    hidden_BSD: Tensor,
    labels: Tensor,
    chunk_tokens: int | str,
    *,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    **_: Any,
) -> Tensor:
    """transformers' loss: the mean over valid tokens, or the sum by ``num_items_in_batch``."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    hidden_ND, labels_N = hidden_BSD.flatten(0, 1), shift_labels.flatten()
    if takes_labels(model.lm_head):
        loss_sum = model.lm_head(
            hidden_ND,
            labels_N,
            chunk_tokens=chunk_tokens,
            ignore_index=ignore_index,
            softcap=_softcap(model),
        )
    else:
        loss_sum = _loss_in_pieces(model, chunk_tokens, hidden_ND, labels_N, ignore_index)
    items = num_items_in_batch
    if items is None:
        items = (labels_N != ignore_index).sum()
    return loss_sum / (items.to(loss_sum.device) if isinstance(items, Tensor) else items)


def takes_labels(head: nn.Module) -> bool:
    """Whether a head is its weight alone, and is given labels for their loss."""
    return hasattr(type(head), BASE) and head.bias is None and altered(head, called=True) is None


def _loss_in_pieces(
    model: Any, chunk_tokens: int | str, hidden_ND: Tensor, labels_N: Tensor, ignore_index: int
) -> Tensor:
    """The sum of the losses through any head: each chunk's logits computed twice."""

    def piece(hidden_CD: Tensor, labels_C: Tensor) -> Tensor:
        logits_CV = logits_of(model, hidden_CD).float()
        return nn.functional.cross_entropy(
            logits_CV, labels_C.to(logits_CV.device), ignore_index=ignore_index, reduction="sum"
        )

    chunk_tokens = resolve_chunk_tokens(
        chunk_tokens,
        hidden_ND.shape[0],
        3 * model.config.vocab_size * 4,  # logits, the loss's copy, and its gradient
        hidden_ND.device,
    )
    pieces = [
        checkpoint(piece, hidden_ND[chunk], labels_N[chunk], use_reentrant=False)
        for chunk in chunk_slices(hidden_ND.shape[0], chunk_tokens)
    ]
    return torch.stack(pieces).sum()


def _softcap(model: Any) -> float | None:
    return getattr(model.config, "final_logit_softcapping", None)
