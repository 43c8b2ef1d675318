"""The method in a transformers model, in place.

    model = AutoModelForCausalLM.from_pretrained(...)
    apply_mini_sequence(model)
    ...                             # train it as before: by hand, with Trainer, with PEFT
    remove_mini_sequence(model)

The model, its trunk, its decoder layers and its head get subclasses of their classes with another
``forward`` (forward.py, head.py), under the same names. Parameters, buffers and modules stay the
objects they were, so ``state_dict``, ``save_pretrained``, optimizers and wrappers see no
difference. layers.py has the models that are supported, and calls.py finds what others have done to
them and would be left out.
"""

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from mst_train.config import AUTO
from mst_train.errors import UserError
from mst_train.integrations.huggingface.calls import (
    BASE,
    base_of,
    origin,
    rebind,
    rewritten,
    unreached,
)
from mst_train.integrations.huggingface.forward import (
    STATE,
    Settings,
    causal_lm_forward,
    layer_forward,
    trunk_forward,
)
from mst_train.integrations.huggingface.head import head_forward
from mst_train.integrations.huggingface.layers import FAMILIES, Family
from mst_train.mst.chunking import resolve_chunk_tokens

FORWARDS = {
    "model": causal_lm_forward,
    "trunk": trunk_forward,
    "layer": layer_forward,
    "head": head_forward,
}
"""Of the modules that get other classes, what makes their forwards."""

UNIFORM: dict[str, Any] = {"clip_qkv": None, "decoder_sparse_step": 1, "mlp_only_layers": []}
"""Of mixtures of experts: queries, keys and values as they are, and experts in every layer."""

LEAF = "_z3_leaf"
"""DeepSpeed's mark of a module whose parameters ZeRO-3 gathers together, for all of its call."""


def apply_mini_sequence(
    model: nn.Module,
    *,
    mlp_chunk_tokens: int | str = AUTO,
    head_chunk_tokens: int | str = AUTO,
    block_chunk_tokens: int | str = AUTO,
    keep_attention: bool = True,
    recompute: bool = True,
    attention: str = AUTO,
    evaluation_logits: bool = False,
) -> nn.Module:
    """Give a transformers causal language model mini-sequences, in place.

    A call with labels computes the loss without the logits, in chunks of tokens, and
    ``output.logits`` is None: ``evaluation_logits`` gives them to a Trainer's compute_metrics. It
    honours ``num_items_in_batch``, ``shift_labels`` and ``ignore_index``. Decoder layers run in
    mini-sequences in such calls, and in training mode without labels. Loss and gradients are those
    of the model as it was, up to rounding.

    The model runs as it always did where a KV cache, the attentions' weights or all layers' hidden
    states are asked for, under a 4-dimensional mask or one that hides tokens other than unlabelled
    ones at the rows' ends (a batch padded on the right is exact without its mask), and without
    labels outside of training, as in ``generate``. In training a warning says so once.
    ``position_ids`` that start anew within a row are packed documents where transformers takes them
    for that: without a mask, and with ``use_cache`` or ``config.use_cache`` off.

    Works under autocast, Trainer and Accelerate, and with PEFT's adapters and bitsandbytes' weights
    (before or after they are added): an MLP with adapters runs as it is, in the block's chunks. The
    model can be wrapped in DDP, FSDP or ZeRO afterwards; docs/adopting.md has a table. Gradient
    checkpointing of transformers' own is not used in addition where ``recompute`` is true.

    Modules that the method does not call are attention, and plain MLPs; others keep their hooks,
    and what has become of them. What cannot be kept is refused, here or in the forward.

    Args:
        model: as transformers made it, or a PEFT model or DDP around it.
        mlp_chunk_tokens, head_chunk_tokens, block_chunk_tokens: tokens in a chunk; "auto" bounds a
            chunk's intermediates by bytes.
        keep_attention: keep attention's result rather than compute it again.
        recompute: keep each layer's input alone and run the layer again in the backward. False:
            autograd keeps what it would, but for the MLP's and the head's intermediates.
        attention: the backend, as ``kernel.attention``.
        evaluation_logits: a call with labels outside of training mode returns the logits too, as
            long as they are; else compute_metrics and preprocess_logits_for_metrics get ``()``.

    Returns:
        ``model``.

    Raises:
        UserError: an unsupported model, or one with changes that would be lost; it then has no
            mini-sequences.
        RuntimeError: in a forward, such changes since, or dropout inside layers that are to be run
            again.

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
    settings = Settings(
        family,
        mlp_chunk_tokens,
        head_chunk_tokens,
        block_chunk_tokens,
        keep_attention,
        recompute,
        attention,
        evaluation_logits,
    )
    for kind, module in _places(causal_lm):
        before: Any = type(module)
        module.__class__ = _method_class(kind, before)
        rebind(module, before)
        if kind == "layer":
            setattr(module, LEAF, True)
    for module in (causal_lm, causal_lm.model):
        setattr(module, STATE, settings)
    return model


def remove_mini_sequence(model: nn.Module) -> nn.Module:
    """Make a model what it was before ``apply_mini_sequence``; others stay as they are."""
    causal_lm = _unwrapped(model)
    changed = [m for m in causal_lm.modules() if hasattr(type(m), BASE)]
    for module in changed:
        if BASE not in vars(type(module)):
            raise UserError(
                f"a {type(module).__name__} has got another class since apply_mini_sequence: "
                f"take off what came after it first"
            )
    for module in changed:
        before: Any = type(module)
        module.__class__ = base_of(before)
        rebind(module, before)
        for name in (LEAF, STATE):
            vars(module).pop(name, None)
    return model


# --- what is supported ---------------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> Any:
    """The model itself, where adapters or DDP are around it."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    peft = sys.modules.get("peft")  # who has a PEFT model has imported it
    if peft is not None and isinstance(model, peft.PeftModel):
        return model.get_base_model()
    return model


def _checked_family(causal_lm: Any) -> Family:
    by_class = {family.causal_lm: family for family in FAMILIES}
    family = by_class.get(type(causal_lm).__name__)
    if family is None or type(causal_lm) is not family.get(family.causal_lm):
        raise UserError(
            f"{origin(causal_lm)} is not supported: apply_mini_sequence takes "
            f"{', '.join(by_class)}, as transformers makes them, and before whatever wraps them"
        )
    config = causal_lm.config
    for key, only in UNIFORM.items():
        if getattr(config, key, None) not in (None, only):
            raise UserError(
                f"config.{key}={getattr(config, key)} is not supported: it must be {only}"
            )
    found: dict[str, list[int]] = {}
    for index, layer in enumerate(causal_lm.model.layers):
        own = f"{family.prefix}DecoderLayer"
        if type(layer) is family.get(own):
            reason = family.problem(layer)
        else:
            reason = f"it is a {origin(layer)} and not transformers' own {own}"
        if reason is not None:
            found.setdefault(reason, []).append(index)
    problems = [
        f"layer {', '.join(map(str, indices))}: {reason}: apply_mini_sequence comes before "
        f"whatever wraps it"
        for reason, indices in found.items()
    ]
    for reason, names in _reasons(causal_lm).items():
        problems.append(
            f"{', '.join(names)} {reason}: apply_mini_sequence comes before what wraps a forward"
        )
    if getattr(config, "resid_pdrop", 0.0):
        problems.append(f"config.resid_pdrop={config.resid_pdrop} is not supported: it must be 0")
    for key, causal in (("use_bidirectional_attention", False), ("is_causal", True)):
        if bool(getattr(config, key, causal)) is not causal:
            problems.append(f"config.{key} is not supported: attention is causal")
    if problems:
        raise UserError(problems)
    return family


def _reasons(causal_lm: Any) -> dict[str, list[str]]:
    """Why modules would not come to a new forward of their class, and their names."""
    names = {module: name for name, module in causal_lm.named_modules()}
    reasons: dict[str, list[str]] = {}
    for kind, module in _places(causal_lm):
        cls: Any = type(module)
        reason = unreached(module, _method_class(kind, cls)) or rewritten(cls.forward)
        if reason is not None and kind != "head":  # any head is called
            reasons.setdefault(reason, []).append(names[module] or "the model")
    return reasons


def _places(causal_lm: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that get other classes, and what they are."""
    yield "model", causal_lm
    yield "trunk", causal_lm.model
    for layer in causal_lm.model.layers:
        yield "layer", layer
    head = causal_lm.lm_head
    if type(head) is nn.Linear and unreached(head, _method_class("head", nn.Linear)) is None:
        yield "head", head


# --- classes -------------------------------------------------------------------------------------


@cache
def _method_class(kind: str, base: Any) -> Any:
    """A class of the same name: others look at names (``save_pretrained``, FSDP's policies)."""

    def reduce(self: Any, protocol: Any) -> Any:
        made = base.__reduce_ex__(self, protocol)
        if type(self) is not cls:  # FSDP's, made of this one
            return made
        return _new, (kind, base), *made[2:]

    members = {"forward": FORWARDS[kind](base), "__reduce_ex__": reduce, BASE: base}
    same = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    cls = type(base.__name__, (base,), members | same)
    return cls


def _new(kind: str, base: Any) -> nn.Module:
    """What a pickled module is filled into; its class cannot be found by its name."""
    cls = _method_class(kind, base)
    return cls.__new__(cls)
