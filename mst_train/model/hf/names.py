"""What a decoder's parameters are called in a checkpoint.

Each is one tensor there, but for those of a mixture of experts, which are one for each expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from mst_train.model.hf.families import FAMILIES, PER_EXPERT
from mst_train.model.transformer import Transformer

OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
IN_BLOCK = {
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


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's tensor is in a decoder: a parameter, or one expert's part of it."""

    parameter: nn.Parameter
    expert: int | None = None

    @property
    def tensor(self) -> Tensor:
        """The parameter's values, or a view of the expert's."""
        values = self.parameter.detach()
        return values if self.expert is None else values[self.expert]


def places_by_name(model: Transformer, model_type: str) -> Iterator[tuple[str, Place]]:
    """Every tensor of a checkpoint of this family, by its name; a tied one once, as the embedding.

    The tensors of one parameter follow each other.
    """
    in_block = IN_BLOCK | NORMS[model.config.norm_placement]
    experts = FAMILIES[model_type].experts or PER_EXPERT
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if module in OUTER:
            yield f"{OUTER[module]}.{kind}", Place(parameter)
            continue
        _, layer, rest = module.split(".", 2)
        inside = f"model.layers.{layer}"
        if rest == "mlp.router":
            yield f"{inside}.{experts.module}.gate.{kind}", Place(parameter)
        elif rest == "mlp":
            for expert in range(model.config.num_experts or 0):
                matrix = f"experts.{expert}.{experts.matrices[kind]}.weight"
                yield f"{inside}.{experts.module}.{matrix}", Place(parameter, expert)
        else:
            yield f"{inside}.{in_block[rest]}.{kind}", Place(parameter)
