"""What a transformers model's modules do in mini-sequences, in the place of their forwards.

A model, its trunk, its decoder layers and its head get subclasses of their classes with these
forwards. All of them are called as transformers calls them, so whatever is around them (hooks,
FSDP, ZeRO, Accelerate, checkpointing) sees what it knows; what makes a call one in mini-sequences
is the attention mask, in whose place trunk and layers are given a ``Call``.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from mst_train.attention.select import KernelAttention, select_attention
from mst_train.integrations.huggingface.calls import origin, rewritten
from mst_train.integrations.huggingface.head import logits_of, loss_of
from mst_train.integrations.huggingface.layers import (
    Family,
    RowwiseLayer,
    once_only,
    plain_activation,
)
from mst_train.mst import (
    ATTENTION,
    AttentionKernel,
    Documents,
    Scores,
    attend,
    mini_sequence_block,
    router_losses,
)
from mst_train.mst.autocast import Autocast
from mst_train.mst.router_losses import RouterLosses
from mst_train.ranges import BLOCK_RANGE, HEAD_RANGE

STATE = "_mini_sequence"
"""The attribute of a model, and of its trunk, that have the method."""

log = logging.getLogger(__name__)


@dataclass
class Settings:
    """What ``apply_mini_sequence`` was asked for, and what its forwards remember."""

    family: Family
    mlp_chunk_tokens: int | str
    head_chunk_tokens: int | str
    block_chunk_tokens: int | str
    keep_attention: bool
    recompute: bool
    attention: str
    evaluation_logits: bool = False
    warned: set[str] = field(default_factory=set)
    as_before: bool = False
    """Whether a call that does not suit is being computed, as the model always did."""
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

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"kernels": {}}  # they are the device's, and found again


class Call:
    """One forward in mini-sequences, given to trunk and layers in the attention mask's place.

    A module that does not know it fails on it, and one that never sees it is noticed.
    """

    documents: Documents | None = None
    reached = 0
    """Modules that have run in mini-sequences."""
    running = ""
    """The last of them, in words."""
    index = 0
    """The place of the last layer."""

    def __init__(self, settings: Settings, *, packed: bool) -> None:
        self.settings, self.packed = settings, packed

    def run(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A module's result, which it has computed in mini-sequences."""
        self.running, reached, cause = name, self.reached, None
        try:
            result = module(*args, attention_mask=self, **kwargs)
        except (TypeError, AttributeError) as error:  # what a mask that is none leads to
            if self.reached > reached:
                raise
            cause = error
        if self.reached == reached:
            own = vars(module).get("forward")
            what = f"its own forward ({origin(own)})" if own else "a forward or hook of it"
            raise RuntimeError(
                f"{name} has not run in mini-sequences, because of {what}: let it call the "
                f"forward that it found after apply_mini_sequence, with the arguments that it "
                f"got, or remove_mini_sequence first"
            ) from cause
        return result


def causal_lm_forward(base: Any) -> Any:
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
        settings: Settings | None = getattr(self, STATE, None)
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
            settings.as_before = True
            try:
                return base.forward(self, **call)
            finally:
                settings.as_before = False
        _check_forward(base, "the model")
        losses = _router_losses(self, call)
        with router_losses.first(losses):
            hidden_BSD = (
                Call(settings, packed=_packed(self, call))
                .run(
                    "the model's trunk",
                    self.model,
                    input_ids=input_ids,
                    position_ids=position_ids,
                    past_key_values=None,
                    inputs_embeds=inputs_embeds,
                    use_cache=False,
                )
                .last_hidden_state
            )
        if labels is None:
            return CausalLMOutputWithPast(logits=logits_of(self, hidden_BSD))
        with record_function(HEAD_RANGE):
            loss = loss_of(self, hidden_BSD, labels, settings.head_chunk_tokens, **kwargs)
        if losses is not None:
            loss = losses.added(loss, torch.ones_like(loss, dtype=torch.int64))
        wanted = settings.evaluation_logits and not self.training
        return CausalLMOutputWithPast(
            loss=loss, logits=logits_of(self, hidden_BSD) if wanted else None
        )

    return forward


def _router_losses(model: Any, call: dict[str, Any]) -> RouterLosses | None:
    """What the model adds to its loss for its routers, if it does."""
    if call["labels"] is None or not _wants_router_logits(model, call):
        return None
    device = model.get_input_embeddings().weight.device
    return RouterLosses(model.num_experts, device, model.router_aux_loss_coef, 0.0)


def _wants_router_logits(model: Any, call: dict[str, Any]) -> bool:
    wanted = call.get("output_router_logits")
    return bool(getattr(model.config, "output_router_logits", False) if wanted is None else wanted)


def trunk_forward(base: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.get("attention_mask")
        if not isinstance(call, Call):
            settings: Settings | None = getattr(self, STATE, None)
            in_training = self.training and torch.is_grad_enabled()
            if settings is not None and in_training and not settings.as_before:
                settings.warn_once("the model's trunk is called by something else than the model")
            return base.forward(self, *args, **kwargs)
        call.reached += 1
        _check_forward(base, "the model's trunk")
        x_BSD, positions = kwargs["inputs_embeds"], kwargs["position_ids"]
        if x_BSD is None:
            x_BSD = self.embed_tokens(kwargs["input_ids"])
        if call.packed:
            call.documents = _documents(positions, x_BSD)
        if positions is None:
            positions = torch.arange(x_BSD.shape[1], device=x_BSD.device)[None]
        rotary = self.rotary_emb(x_BSD, positions)
        with _checkpointed_once(self.layers, call.settings):
            for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
                call.index = index
                with record_function(BLOCK_RANGE):
                    x_BSD = call.run(
                        f"layer {index}",
                        layer,
                        _for_zero(layer, x_BSD),
                        position_embeddings=rotary,
                        position_ids=positions,
                        past_key_values=None,
                        use_cache=False,
                    )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BSD))

    return forward


def layer_forward(base: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.get("attention_mask")
        if not isinstance(call, Call):
            return base.forward(self, *args, **kwargs)
        call.reached += 1
        (x_BSD,), rotary = args, kwargs["position_embeddings"]
        settings, family = call.settings, call.settings.family
        _check_forward(base, call.running)
        rerun = settings.recompute and torch.is_grad_enabled()
        problem = family.problem(self) or (once_only(self) if rerun else None)
        if problem is not None:
            raise RuntimeError(f"{call.running}: {problem}")
        block = RowwiseLayer(self, family, settings.mlp_chunk_tokens, rerun=rerun)
        kernel = settings.kernel(x_BSD, family.scores(self, call.index))
        sinks = self.self_attn.sinks if family.sinks else None
        if settings.recompute:
            return mini_sequence_block(
                block,
                kernel,
                x_BSD,
                rotary,
                documents=call.documents,
                chunk_tokens=block.chunk_tokens(settings.block_chunk_tokens, x_BSD),
                keep=(ATTENTION,) if settings.keep_attention else (),
                sinks=sinks,
            )
        q, k, v = block.before_attention(x_BSD, *rotary)
        assert q is not None
        out = attend(kernel, q, k, v, call.documents, sinks)
        residual, branch = block.after_attention(x_BSD, out)
        return residual + branch

    return forward


def _check_forward(base: Any, name: str) -> None:
    reason = rewritten(base.forward)
    if reason is not None:
        raise RuntimeError(f"{name} {reason}: mini-sequences would leave it out")


def _unsuited(model: Any, call: dict[str, Any]) -> str | None:
    """Why a call cannot be computed in mini-sequences, if it cannot."""
    taken = {
        *("input_ids", "inputs_embeds", "position_ids", "labels", "attention_mask"),
        *("num_items_in_batch", "shift_labels", "ignore_index", "return_dict", "logits_to_keep"),
        "output_router_logits",
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
    if call.get("is_causal") is False:
        return "is_causal=False is given"
    others = [k for k, v in call.items() if k not in taken and v is not None and v is not False]
    if others:
        return f"{others[0]} is given, which mini-sequences do not know"
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "alora_invocation_tokens", None):
            return "an activated LoRA (alora_invocation_tokens) begins at some token"
    if call["labels"] is not None and model.loss_function is not ForCausalLMLoss:
        return "the model has a loss function of its own"
    if _wants_router_logits(model, call):
        family: Family = getattr(model, STATE).family
        mask = call["attention_mask"]
        if mask is not None and not bool(mask.all()):
            return "the routers' loss leaves out what attention_mask hides"
        if any(plain_activation(layer, family) is None for layer in model.model.layers):
            return "the routers' loss needs routers and experts as transformers made them"
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


def _for_zero(layer: Any, x: Tensor) -> Tensor:
    """A layer's input, which wants a gradient if the layer's weights do, under ZeRO-3.

    DeepSpeed takes the gradients of a layer's weights when that of its input is there; with none
    (frozen embeddings) that would be before they are.
    """
    if x.requires_grad or not torch.is_grad_enabled():
        return x
    leaves = (p for p in layer.parameters() if hasattr(p, "ds_z3_leaf_module"))
    return x.detach().requires_grad_() if any(p.requires_grad for p in leaves) else x


@contextmanager
def _checkpointed_once(layers: Any, settings: Settings) -> Iterator[None]:
    """Without transformers' checkpointing of layers that keep their input alone already."""
    switched = [layer for layer in layers if settings.recompute and layer.gradient_checkpointing]
    for layer in switched:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in switched:
            layer.gradient_checkpointing = True
