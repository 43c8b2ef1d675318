"""A block's mixture of experts: several gated MLPs in the place of one.

Legend: B batch, S sequence, D hidden, F intermediate, E experts.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mst_train.config import ModelConfig
from mst_train.model import Policy
from mst_train.mst import gated_experts, mini_sequence_experts


class Experts(nn.Module):
    """Gated MLPs, of which each token goes through those that a router chooses.

    Each of the three matrices of all experts is one parameter: gate and up [E, F, D], down
    [E, D, F]. So is each of their biases, [E * F] and [E * D], in a row: no matrix, for optimizers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        self.top_k = config.experts_per_token
        self.normalize = config.normalize_experts
        self.activation = config.activation
        experts, hidden, inside = config.num_experts, config.hidden_size, config.intermediate_size
        self.router = nn.Linear(hidden, experts, bias=config.expert_bias)
        self.gate = nn.Parameter(torch.empty(experts, inside, hidden))
        self.up = nn.Parameter(torch.empty(experts, inside, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, inside))
        self.gate_bias: nn.Parameter | None = None
        self.up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        if config.expert_bias:
            self.gate_bias = nn.Parameter(torch.empty(experts * inside))
            self.up_bias = nn.Parameter(torch.empty(experts * inside))
            self.down_bias = nn.Parameter(torch.empty(experts * hidden))

    @property
    def product_features(self) -> int:
        """Features of the results of the experts' products, per token."""
        _, hidden, inside = self.down.shape
        return self.top_k * (2 * inside + hidden)

    def forward(self, x_BSD: Tensor, policy: Policy, values: bool = True) -> Tensor:
        """[B, S, D] -> [B, S, D]. values: as ``mini_sequence_experts`` takes it."""
        experts: Callable[..., Tensor] = gated_experts
        if policy.mini_sequence:
            chunk_tokens = policy.mlp_chunk_tokens
            experts = partial(mini_sequence_experts, chunk_tokens=chunk_tokens, values=values)
        return experts(
            x_BSD,
            self.router.weight,
            self.gate,
            self.up,
            self.down,
            biases=self._biases(),
            top_k=self.top_k,
            normalize=self.normalize,
            activation=self.activation,
        )

    def _biases(self) -> list[Tensor] | None:
        """Of router [E], gate and up [E, F] and down [E, D]."""
        if self.gate_bias is None or self.up_bias is None or self.down_bias is None:
            return None
        experts = self.router.out_features
        each = (self.gate_bias, self.up_bias, self.down_bias)
        return [self.router.bias, *(bias.view(experts, -1) for bias in each)]


def untaught_routers(config: ModelConfig) -> str | None:
    """What to say of routers that the model's loss teaches nothing; None where it does."""
    if config.num_experts in (None, 1) or config.experts_per_token > 1:
        return None
    if not config.normalize_experts:
        return None
    return (
        "model.experts_per_token=1 with model.normalize_experts=true multiplies the one expert's "
        "result by 1, whatever its probability, so that the loss does not teach the routers which "
        "to choose: model.normalize_experts=false multiplies it by the probability"
    )
