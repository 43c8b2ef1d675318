"""What a decoder's parameters are called in a checkpoint.

Each is one tensor there, but for those of a mixture of experts, which are one for each expert, or
two of them in one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mst_train.model.hf.families import FAMILIES, PER_EXPERT, ExpertNames
from mst_train.model.transformer import Transformer

OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
IN_BLOCK = {
    "attention": "self_attn",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
NORMS = {
    "before": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "around": {
        "attention_norm": "input_layernorm",
        "attention_output_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
    "after": {
        "attention_output_norm": "post_attention_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
}
"""The names of a block's norms, by ``norm_placement``."""


Values = Callable[[nn.Parameter], Tensor]


class Place(Protocol):
    """Where a checkpoint's tensor is in a decoder. parameters: those that have it, or a part."""

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]: ...

    def stored(self, values: Values = nn.Parameter.detach) -> Tensor:
        """The tensor as a checkpoint has it, made of these ``values`` of the parameters."""
        ...

    def read(self, tensor: Tensor) -> None:
        """Give the parameters what a checkpoint has."""
        ...


@dataclass(frozen=True)
class Part:
    """A parameter, or one expert's part of it."""

    parameter: nn.Parameter
    expert: int | None = None

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.parameter,)

    def stored(self, values: Values = nn.Parameter.detach) -> Tensor:
        whole = values(self.parameter)
        return whole if self.expert is None else whole[self.expert]

    def read(self, tensor: Tensor) -> None:
        self.stored().copy_(tensor)


@dataclass(frozen=True)
class Columns:
    """Parameters of all experts whose features take turns in one tensor: [E, in, features], or
    [E, features] of biases (gpt-oss).
    """

    parameters: tuple[nn.Parameter, ...]
    experts: int

    def stored(self, values: Values = nn.Parameter.detach) -> Tensor:
        pieces = [values(parameter).view(self._shape(parameter)) for parameter in self.parameters]
        pieces = [piece.mT if piece.ndim == 3 else piece for piece in pieces]
        return torch.stack(pieces, -1).flatten(-2)

    def read(self, tensor: Tensor) -> None:
        for turn, parameter in enumerate(self.parameters):
            piece = tensor[..., turn :: len(self.parameters)]
            piece = piece.mT if piece.ndim == 3 else piece
            parameter.detach().view(self._shape(parameter)).copy_(piece)

    def _shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        if parameter.ndim == 1:
            return self.experts, parameter.numel() // self.experts
        return tuple(parameter.shape)


def places_by_name(model: Transformer, model_type: str) -> Iterator[tuple[str, Place]]:
    """Every tensor of a checkpoint of this family, by its name; a tied one once, as the embedding.

    The tensors of one parameter follow each other.
    """
    in_block = IN_BLOCK | NORMS[model.config.norm_placement]
    names = FAMILIES[model_type].experts or PER_EXPERT
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if module in OUTER:
            yield f"{OUTER[module]}.{kind}", Part(parameter)
            continue
        _, layer, rest = module.split(".", 2)
        inside = f"model.layers.{layer}"
        if rest == "mlp.router":
            yield f"{inside}.{names.module}.{names.router}.{kind}", Part(parameter)
        elif rest == "mlp":
            mixture = model.get_submodule(module)
            experts = model.config.num_experts or 0  # a parameter's shape may be elsewhere
            for own, place in _of_experts(mixture, kind, parameter, experts, names):
                yield f"{inside}.{names.module}.experts.{own}", place
        else:
            yield f"{inside}.{in_block[rest]}.{kind}", Part(parameter)


def _of_experts(
    mixture: nn.Module, kind: str, parameter: nn.Parameter, experts: int, names: ExpertNames
) -> Iterator[tuple[str, Place]]:
    """The tensors that one of a mixture's parameters is in, if not in that of one before it."""
    matrix, _, bias = kind.partition("_")
    if not names.together:
        for expert in range(experts):
            yield f"{expert}.{names.matrices[matrix]}.weight", Part(parameter, expert)
    elif matrix != "up":
        kinds = (kind, kind.replace("gate", "up")) if matrix == "gate" else (kind,)
        parameters = tuple(mixture.get_parameter(own) for own in kinds)
        suffix = f"_{bias}" if bias else ""
        yield f"{names.matrices[matrix]}{suffix}", Columns(parameters, experts)
