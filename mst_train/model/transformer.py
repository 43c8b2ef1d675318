"""The decoder: a Llama transformer whose memory policy is a property, not another model.

Legend: B batch, S sequence, N = B*S tokens, D hidden, F intermediate, H query heads, K key-value
heads, E head size, V vocabulary.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from mst_kernels import add_rms_norm, rms_norm
from mst_train.config import ModelConfig
from mst_train.memory.tracker import BLOCK_RANGE, HEAD_RANGE
from mst_train.model.attention import Attention, KernelAttention, reference_attention
from mst_train.model.rope import rope, rotary_angles
from mst_train.mst import (
    Documents,
    Offload,
    Policy,
    cross_entropy,
    gated_mlp,
    mini_sequence_block,
    mini_sequence_cross_entropy,
    mini_sequence_mlp,
    recompute_block,
)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in fp32 at least."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum), in one pass."""
        return add_rms_norm(x, residual, self.weight, self.epsilon)


class SelfAttention(nn.Module):
    """Projections and rotary embeddings around a causal attention function."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.head_dim = config.head_dim
        query_size = config.num_heads * config.head_dim
        key_size = config.num_kv_heads * config.head_dim
        self.query = nn.Linear(config.hidden_size, query_size, bias=False)
        self.key = nn.Linear(config.hidden_size, key_size, bias=False)
        self.value = nn.Linear(config.hidden_size, key_size, bias=False)
        self.output = nn.Linear(query_size, config.hidden_size, bias=False)

    def project(
        self, x_BSD: Tensor, cos: Tensor, sin: Tensor, queries: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Queries (if wanted), keys and values, [B, S, D] -> [B, S, heads, E] each."""
        heads = (*x_BSD.shape[:2], -1, self.head_dim)
        k_BSKE = self.key(x_BSD).view(heads)
        v_BSKE = self.value(x_BSD).view(heads)
        if not queries:
            return None, rope(k_BSKE[:, :, :0], k_BSKE, cos, sin)[1], v_BSKE
        q_BSHE, k_BSKE = rope(self.query(x_BSD).view(heads), k_BSKE, cos, sin)
        return q_BSHE, k_BSKE, v_BSKE


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, policy: Policy) -> Tensor:
        weights = (self.gate.weight, self.up.weight, self.down.weight)
        if policy.mini_sequence:
            return mini_sequence_mlp(x_BSD, *weights, chunk_tokens=policy.mlp_chunk_tokens)
        return gated_mlp(x_BSD, *weights)


class Block(nn.Module):
    """One pre-norm decoder layer: attention, then MLP, each added to the residual stream.

    Two parts that treat each token by itself, around attention (``mst.RowwiseBlock``).
    """

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = SelfAttention(config, attention)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = MLP(config)
        self.policy = Policy()

    def forward(
        self, x_BSD: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None
    ) -> Tensor:
        q_BSHE, k_BSKE, v_BSKE = self.before_attention(x_BSD, cos, sin)
        assert q_BSHE is not None
        out_BSHE = self.attention.attention(q_BSHE, k_BSKE, v_BSKE, documents)
        stream_BSD, branch_BSD = self.after_attention(x_BSD, out_BSHE)
        return stream_BSD + branch_BSD

    def before_attention(
        self, x_BSD: Tensor, cos: Tensor, sin: Tensor, *, queries: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """[B, S, D] -> q [B, S, H, E] (None without ``queries``), k and v [B, S, K, E]."""
        return self.attention.project(self.attention_norm(x_BSD), cos, sin, queries)

    def after_attention(self, x_BSD: Tensor, out_BSHE: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, D], [B, S, H, E] -> the residual stream and the MLP's branch, [B, S, D] each."""
        attention_BSD = self.attention.output(out_BSHE.flatten(2))
        normed_BSD, stream_BSD = self.mlp_norm.after_adding(attention_BSD, x_BSD)
        return stream_BSD, self.mlp(normed_BSD, self.policy)


class Transformer(nn.Module):
    """A Llama decoder language model.

    ``policy`` and ``offload`` may be replaced between steps: they change what the model keeps,
    where, and what it recomputes, never its result.
    """

    def __init__(
        self,
        config: ModelConfig,
        policy: Policy | None = None,
        attention: Attention = reference_attention,
    ) -> None:
        super().__init__()
        self.config = config
        self.offload: Offload | None = None
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.policy = policy or Policy()

    @property
    def policy(self) -> Policy:
        """What the model keeps and what it recomputes."""
        return self._policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy = policy
        for block in self._decoder_blocks():
            block.policy = policy

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy of a batch.

        Args:
            tokens: [B, S] int64.
            labels: [B, S] int64, already shifted; -100 where there is nothing to predict.
            positions: [B, S] int64; None: 0 to S - 1 in every row.
            documents: confines attention to each document; None: to each row.

        Returns:
            loss_sum: fp32 scalar (fp64 for an fp64 model), the sum over valid tokens.
            valid_tokens: int64 scalar.
        """
        hidden_ND = self.hidden(tokens, positions, documents).flatten(0, 1)
        labels_N = labels.flatten()
        with record_function(HEAD_RANGE):
            if not self.policy.mini_sequence:
                return cross_entropy(hidden_ND, self.head.weight, labels_N)
            chunk_tokens = self.policy.head_chunk_tokens
            return mini_sequence_cross_entropy(
                hidden_ND, self.head.weight, labels_N, chunk_tokens=chunk_tokens
            )

    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """The logits of every token, [B, S] int64 -> [B, S, V] in the model's type."""
        return self.head(self.hidden(tokens, positions))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """The hidden states that the head reads, [B, S] int64 -> [B, S, D]."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x_BSD = self.embedding(tokens)
        cos, sin = rotary_angles(
            positions, self.config.head_dim, self.config.rope_theta, x_BSD.dtype
        )
        for block in self._decoder_blocks():
            with record_function(BLOCK_RANGE):
                x_BSD = self._run(block, x_BSD, cos, sin, documents)
        return self.norm(x_BSD)

    def _run(
        self, block: Block, x_BSD: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None
    ) -> Tensor:
        """One block, under the policy."""
        policy, attention = self.policy, block.attention.attention
        arguments = (cos, sin, documents)
        if not policy.recompute:
            return block(x_BSD, *arguments)
        if not policy.mini_sequence:  # the standard implementation
            return checkpoint(
                block, x_BSD, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        kept = {"keep_attention": policy.keep_attention, "offload": self.offload}
        if not isinstance(attention, KernelAttention):  # which cannot attend chunk by chunk
            return recompute_block(block, x_BSD, *arguments, **kept)
        return mini_sequence_block(
            block,
            attention.kernel,
            x_BSD,
            (cos, sin),
            documents=documents,
            chunk_tokens=policy.block_chunk_tokens,
            **kept,
        )

    def _decoder_blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw every parameter anew.

        Matrices are normal with standard deviation ``initializer_std``; those that write to the
        residual stream are scaled by 1/sqrt(2 * layers), so that the stream's variance does not
        grow with depth (GPT-2, section 2.3). Norms start at one.
        """
        std = self.config.initializer_std
        residual_std = std / math.sqrt(2 * self.config.num_layers)
        generator = torch.Generator(self.embedding.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            elif name.endswith(("attention.output.weight", "mlp.down.weight")):
                parameter.normal_(0.0, residual_std, generator=generator)
            else:
                parameter.normal_(0.0, std, generator=generator)


def build_model(
    config: ModelConfig,
    *,
    policy: Policy | None = None,
    attention: Attention = reference_attention,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Transformer:
    """A freshly initialised decoder, created in its own type on its own device.

    On the "meta" device the parameters have shapes and no values.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = Transformer(config, policy, attention)
    finally:
        torch.set_default_dtype(previous)
    if torch.device(device).type == "meta":
        return model
    _materialize(model, device)
    model.initialize(seed)
    return model


def _materialize(model: nn.Module, device: torch.device | str) -> None:
    """Give every parameter memory on ``device``; a tied one once."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device))
            setattr(module, name, made[parameter])
