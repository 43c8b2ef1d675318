"""The method in a transformers model, in place.

    model = AutoModelForCausalLM.from_pretrained(...)
    apply_mini_sequence(model)
    ...                             # train it as before: by hand, with Trainer, with PEFT
    remove_mini_sequence(model)

The model, its trunk and its decoder layers get subclasses of their classes with another
``forward``, under the same names. Parameters, buffers and modules stay the objects they were, so
``state_dict``, ``save_pretrained``, optimizers and wrappers see no difference. ``integrations/
hf_layers.py`` has the models that are supported.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from mst_train.config import AUTO
from mst_train.errors import UserError
from mst_train.integrations.hf_layers import (
    FAMILIES,
    Family,
    RowwiseLayer,
    is_plain,
    random_parts,
)
from mst_train.memory.tracker import BLOCK_RANGE, HEAD_RANGE
from mst_train.model.attention import KernelAttention, select_attention
from mst_train.mst import (
    AttentionKernel,
    Documents,
    Scores,
    attend,
    mini_sequence_block,
    mini_sequence_cross_entropy,
)
from mst_train.mst.autocast import Autocast
from mst_train.mst.chunking import chunk_slices, resolve_chunk_tokens

STATE = "_mini_sequence"
"""The attribute of a model that has the method."""

log = logging.getLogger(__name__)


@dataclass
class _Settings:
    family: Family
    mlp_chunk_tokens: int | str
    head_chunk_tokens: int | str
    block_chunk_tokens: int | str
    keep_attention: bool
    recompute: bool
    attention: str
    classes: dict[str, type]
    """The subclasses, by what they are for."""
    warned: set[str] = field(default_factory=set)
    kernels: dict[tuple[torch.device, torch.dtype, Scores], AttentionKernel] = field(
        default_factory=dict
    )

    def kernel(self, x: Tensor, scores: Scores) -> AttentionKernel:
        """What computes a layer's attention for tensors like x."""
        key = (x.device, Autocast.here(x.device).cast(x[:0]).dtype, scores)
        if key not in self.kernels:
            chosen = select_attention(self.attention, *key)
            if not isinstance(chosen, KernelAttention):
                chosen = select_attention("tiled", *key)
            assert isinstance(chosen, KernelAttention)
            self.kernels[key] = chosen.kernel
        return self.kernels[key]

    def warn_once(self, reason: str) -> None:
        if reason not in self.warned:
            self.warned.add(reason)
            log.warning("this batch is computed without mini-sequences: %s", reason)


def apply_mini_sequence(
    model: nn.Module,
    *,
    mlp_chunk_tokens: int | str = AUTO,
    head_chunk_tokens: int | str = AUTO,
    block_chunk_tokens: int | str = AUTO,
    keep_attention: bool = True,
    recompute: bool = True,
    attention: str = AUTO,
) -> nn.Module:
    """Give a transformers causal language model mini-sequences, in place.

    A call with labels computes the loss without the logits, in chunks of tokens, and
    ``output.logits`` is None (so a Trainer's compute_metrics gets none); it honours
    ``num_items_in_batch``, ``shift_labels`` and ``ignore_index``. Decoder layers run in
    mini-sequences in such calls, and in training mode without labels. Loss and gradients are those
    of the model as it was, up to rounding.

    The model runs as it always did where a KV cache, the attentions' weights or all layers' hidden
    states are asked for, under a 4-dimensional mask or one that hides tokens other than unlabelled
    ones at the rows' ends (a batch padded on the right is exact without its mask), and without
    labels outside of training, as in ``generate``. In training a warning says so once.
    ``position_ids`` that start anew within a row are packed documents where transformers takes them
    for that: without a mask, and with ``use_cache`` or ``config.use_cache`` off.

    Works under autocast, Trainer and accelerate, and with PEFT's adapters (before or after they are
    added): an MLP with adapters runs as it is, in the block's chunks. Gradient checkpointing of
    transformers' own is not used in addition where ``recompute`` is true.

    Args:
        model: as transformers made it, or a PEFT model around it.
        mlp_chunk_tokens, head_chunk_tokens, block_chunk_tokens: tokens in a chunk; "auto" bounds a
            chunk's intermediates by bytes.
        keep_attention: keep attention's result rather than compute it again.
        recompute: keep each layer's input alone and run the layer again in the backward. False:
            autograd keeps what it would, but for the MLP's and the head's intermediates.
        attention: the backend, as ``kernel.attention``.

    Returns:
        ``model``.

    Raises:
        UserError: an unsupported model; nothing has changed then.
        RuntimeError: in a forward, dropout inside layers that are to be run again.

    Memory: as ``mini_sequence_block`` and ``mini_sequence_cross_entropy``.
    """
    causal_lm = _unwrapped(model)
    remove_mini_sequence(model)
    family = _checked_family(causal_lm)
    for chunk_tokens in (mlp_chunk_tokens, head_chunk_tokens, block_chunk_tokens):
        try:
            resolve_chunk_tokens(chunk_tokens, 1, 1, torch.device("cpu"))
        except ValueError as error:
            raise UserError(str(error)) from error
    places = _places(causal_lm)
    classes = {
        "model": _subclass(type(causal_lm), _causal_lm_forward),
        "trunk": _subclass(type(causal_lm.model), _trunk_forward),
        "layer": _subclass(family.get(f"{family.prefix}DecoderLayer"), _layer_forward),
    }
    settings = _Settings(
        family,
        mlp_chunk_tokens,
        head_chunk_tokens,
        block_chunk_tokens,
        keep_attention,
        recompute,
        attention,
        classes,
    )
    for kind, module in places:
        module.__class__ = classes[kind]
    setattr(causal_lm, STATE, settings)
    return model


def remove_mini_sequence(model: nn.Module) -> nn.Module:
    """Make a model what it was before ``apply_mini_sequence``; others stay as they are."""
    causal_lm = _unwrapped(model)
    if STATE in vars(causal_lm):
        places, classes = _places(causal_lm), getattr(causal_lm, STATE).classes
        for kind, module in places:
            if type(module) is not classes[kind]:
                raise UserError(
                    f"a {type(module).__name__} has got another class since apply_mini_sequence: "
                    f"take off what came after it first"
                )
        for _, module in places:
            module.__class__ = type(module).__mro__[1]
        delattr(causal_lm, STATE)
    return model


# --- what is supported ---------------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> Any:
    """The model itself, where adapters are around it."""
    peft = sys.modules.get("peft")  # who has a PEFT model has imported it
    if peft is not None and isinstance(model, peft.PeftModel):
        return model.get_base_model()
    return model


def _checked_family(causal_lm: Any) -> Family:
    by_class = {family.causal_lm: family for family in FAMILIES}
    family = by_class.get(type(causal_lm).__name__)
    if family is None or type(causal_lm) is not family.get(family.causal_lm):
        kind = f"{type(causal_lm).__module__}.{type(causal_lm).__qualname__}"
        raise UserError(
            f"{kind} is not supported: apply_mini_sequence takes {', '.join(by_class)}, as "
            f"transformers makes them"
        )
    problems = []
    expected = {"self_attn": "Attention", "mlp": "MLP"}
    for index, layer in enumerate(causal_lm.model.layers):
        parts = {"": "DecoderLayer"} | expected
        for name, suffix in parts.items():
            part = getattr(layer, name) if name else layer
            if type(part) is not family.get(family.prefix + suffix):
                kind = f"{type(part).__module__}.{type(part).__qualname__}"
                problems.append(
                    f"layer {index}: {name or 'it'} is a {kind} and not transformers' own "
                    f"{family.prefix}{suffix}: apply_mini_sequence comes before whatever wraps it"
                )
    config = causal_lm.config
    for key in ("attention_dropout", "resid_pdrop"):
        if getattr(config, key, 0.0):
            problems.append(f"config.{key}={getattr(config, key)} is not supported: it must be 0")
    if getattr(config, "use_bidirectional_attention", None):
        problems.append("config.use_bidirectional_attention is not supported: attention is causal")
    if problems:
        raise UserError(problems)
    return family


def _places(causal_lm: Any) -> list[tuple[str, nn.Module]]:
    """The modules that get other classes, and the classes' names in ``_Settings``."""
    trunk = causal_lm.model
    return [("model", causal_lm), ("trunk", trunk), *(("layer", layer) for layer in trunk.layers)]


def _subclass(base: type, make_forward: Any) -> type:
    """A class of the same name: others look at names (``save_pretrained``, FSDP's policies)."""
    same = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), {"forward": make_forward(base), **same})


# --- forward -------------------------------------------------------------------------------------


def _causal_lm_forward(base: Any) -> Any:
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        settings: _Settings | None = getattr(self, STATE, None)
        call = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            **kwargs,
        }
        training = self.training and torch.is_grad_enabled()
        if settings is None or (labels is None and not training):
            return base.forward(self, **call)
        reason = _unsuited(self, call)
        if reason is not None:
            if training:
                settings.warn_once(reason)
            return base.forward(self, **call)
        hidden_BSD = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            packed=_packed(self, call),
            mini_sequence=settings,
        ).last_hidden_state
        if labels is None:
            return CausalLMOutputWithPast(logits=_logits(self, hidden_BSD))
        with record_function(HEAD_RANGE):
            loss = _loss(self, settings, hidden_BSD, labels, **kwargs)
        return CausalLMOutputWithPast(loss=loss)

    return forward


def _trunk_forward(base: Any) -> Any:
    def forward(
        self: Any, *args: Any, mini_sequence: _Settings | None = None, **kwargs: Any
    ) -> Any:
        if mini_sequence is None:
            return base.forward(self, *args, **kwargs)
        x_BSD, positions = kwargs["inputs_embeds"], kwargs["position_ids"]
        if x_BSD is None:
            x_BSD = self.embed_tokens(kwargs["input_ids"])
        documents = _documents(positions, x_BSD) if kwargs["packed"] else None
        if positions is None:
            positions = torch.arange(x_BSD.shape[1], device=x_BSD.device)[None]
        rotary = self.rotary_emb(x_BSD, positions)
        with _checkpointed_once(self.layers, mini_sequence):
            for layer in self.layers[: self.config.num_hidden_layers]:
                with record_function(BLOCK_RANGE):
                    x_BSD = layer(x_BSD, rotary, documents, mini_sequence=mini_sequence)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BSD))

    return forward


def _layer_forward(base: Any) -> Any:
    def forward(
        self: Any, *args: Any, mini_sequence: _Settings | None = None, **kwargs: Any
    ) -> Any:
        if mini_sequence is None:
            return base.forward(self, *args, **kwargs)
        x_BSD, rotary, documents = args
        settings, family = mini_sequence, mini_sequence.family
        rerun = settings.recompute and torch.is_grad_enabled()
        block = RowwiseLayer(self, family, settings.mlp_chunk_tokens, rerun=rerun)
        kernel = settings.kernel(x_BSD, family.scores(self))
        if settings.recompute:
            random = random_parts(self) if rerun else []
            if random:
                raise RuntimeError(
                    f"{random[0]} is dropout inside a decoder layer, which would be drawn anew "
                    f"when the layer runs again: set it to 0 (lora_dropout=0), or "
                    f"apply_mini_sequence(recompute=False)"
                )
            return mini_sequence_block(
                block,
                kernel,
                x_BSD,
                rotary,
                documents=documents,
                chunk_tokens=settings.block_chunk_tokens,
                keep_attention=settings.keep_attention,
            )
        q, k, v = block.before_attention(x_BSD, *rotary)
        assert q is not None
        stream, branch = block.after_attention(x_BSD, attend(kernel, q, k, v, documents))
        return stream + branch

    return forward


def _unsuited(model: Any, call: dict[str, Any]) -> str | None:
    """Why a call cannot be computed in mini-sequences, if it cannot."""
    taken = {
        *("input_ids", "inputs_embeds", "position_ids", "labels", "attention_mask"),
        *("num_items_in_batch", "shift_labels", "ignore_index", "return_dict", "logits_to_keep"),
    }
    if call["past_key_values"] is not None or call["use_cache"]:
        return "a KV cache is asked for (use_cache=False does without)"
    if (call["input_ids"] is None) == (call["inputs_embeds"] is None):
        return "it has both or neither of input_ids and inputs_embeds"
    kept = call["logits_to_keep"]
    if isinstance(kept, Tensor) or kept:
        return "logits_to_keep is given"
    returns = call.get("return_dict")
    if not (model.config.return_dict if returns is None else returns):
        return "a tuple is asked for (return_dict)"
    for key in ("output_attentions", "output_hidden_states"):
        asked = call.get(key)
        if getattr(model.config, key, False) if asked is None else asked:
            return f"{key} is asked for"
    others = [k for k, v in call.items() if k not in taken and v is not None and v is not False]
    if others:
        return f"{others[0]} is given, which mini-sequences do not know"
    if call["labels"] is not None and model.loss_function is not ForCausalLMLoss:
        return "the model has a loss function of its own"
    if not _hides_nothing(call):
        return (
            "attention_mask hides tokens, and not only unlabelled ones at the rows' ends: pad on "
            "the right, with labels of -100, or pack documents"
        )
    return None


def _hides_nothing(call: dict[str, Any]) -> bool:
    """Whether the loss is the same without the attention mask."""
    mask = call["attention_mask"]
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return False
    seen = mask.bool()
    if bool(seen.all()):
        return True
    labels = call["labels"] if call.get("shift_labels") is None else None
    if labels is None or labels.shape != seen.shape:
        return False
    # No token sees a later one, so padding behind all tokens is seen by padding alone.
    ignored = labels == call.get("ignore_index", -100)
    on_the_right = (seen[:, 1:] <= seen[:, :-1]).all()
    return bool(on_the_right & (seen | ignored.to(seen.device)).all())


def _packed(model: Any, call: dict[str, Any]) -> bool:
    """Whether transformers would look for packed documents: it does not where it makes a cache."""
    use_cache = model.config.use_cache if call["use_cache"] is None else call["use_cache"]
    return call["position_ids"] is not None and call["attention_mask"] is None and not use_cache


def _documents(positions_BS: Tensor, x_BSD: Tensor) -> Documents | None:
    """The documents that positions tell: one begins where they do not go on by one."""
    batch, sequence = x_BSD.shape[:2]
    positions_BS = positions_BS.expand(batch, -1)
    begins = torch.ones_like(positions_BS, dtype=torch.bool)
    begins[:, 1:] = positions_BS.diff(dim=1) != 1
    starts = begins.flatten().nonzero().flatten().cpu()
    if len(starts) == batch:
        return None
    end = torch.tensor([batch * sequence])
    return Documents(torch.cat([starts, end]).to(torch.int32))


@contextmanager
def _checkpointed_once(layers: Any, settings: _Settings) -> Iterator[None]:
    """Without transformers' checkpointing of layers that keep their input alone already."""
    switched = [layer for layer in layers if settings.recompute and layer.gradient_checkpointing]
    for layer in switched:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in switched:
            layer.gradient_checkpointing = True


# --- the head ------------------------------------------------------------------------------------


def _softcap(model: Any) -> float | None:
    softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return softcap


def _logits(model: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = model.lm_head(hidden)
    softcap = _softcap(model)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _loss(
    model: Any,
    settings: _Settings,
    hidden_BSD: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    **_: Any,
) -> Tensor:
    """transformers' loss: the mean over valid tokens, or the sum by ``num_items_in_batch``."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    hidden_ND = hidden_BSD.flatten(0, 1)
    labels_N = shift_labels.flatten().to(hidden_ND.device)
    if is_plain(model.lm_head):
        loss_sum, valid = mini_sequence_cross_entropy(
            hidden_ND,
            model.lm_head.weight,
            labels_N,
            chunk_tokens=settings.head_chunk_tokens,
            ignore_index=ignore_index,
            softcap=_softcap(model),
        )
    else:
        loss_sum = _loss_in_pieces(model, settings, hidden_ND, labels_N, ignore_index)
        valid = (labels_N != ignore_index).sum()
    items = valid if num_items_in_batch is None else num_items_in_batch
    return loss_sum / (items.to(loss_sum.device) if isinstance(items, Tensor) else items)


def _loss_in_pieces(
    model: Any, settings: _Settings, hidden_ND: Tensor, labels_N: Tensor, ignore_index: int
) -> Tensor:
    """The sum of the losses through a head with adapters: each chunk's logits computed twice."""

    def piece(hidden_CD: Tensor, labels_C: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            _logits(model, hidden_CD).float(), labels_C, ignore_index=ignore_index, reduction="sum"
        )

    chunk_tokens = resolve_chunk_tokens(
        settings.head_chunk_tokens,
        hidden_ND.shape[0],
        3 * model.config.vocab_size * 4,  # logits, the loss's copy, and its gradient
        hidden_ND.device,
    )
    pieces = [
        checkpoint(piece, hidden_ND[chunk], labels_N[chunk], use_reentrant=False)
        for chunk in chunk_slices(hidden_ND.shape[0], chunk_tokens)
    ]
    return torch.stack(pieces).sum()
