"""The decoder: one transformer for the families that ``ModelConfig`` describes.

Its memory policy is a property, not another model.

Legend: B batch, S sequence, N = B*S tokens, D hidden, F intermediate, H query heads, K key-value
heads, E head size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from mst_kernels import add_rms_norm, rms_norm
from mst_train.attention.select import Attention, KernelAttention, reference_attention
from mst_train.config import ModelConfig
from mst_train.model import Policy
from mst_train.model.experts import Experts
from mst_train.model.rope import rope, rotary_angles
from mst_train.mst import (
    KEYS,
    OUTPUT,
    QUERIES,
    Documents,
    Offload,
    OnHost,
    Scores,
    cross_entropy,
    gated_mlp,
    linear,
    mini_sequence_block,
    mini_sequence_cross_entropy,
    mini_sequence_losses,
    mini_sequence_mlp,
    recompute_block,
    router_losses,
    rowwise,
)
from mst_train.mst.router_losses import RouterLosses, router_losses_here
from mst_train.ranges import BLOCK_RANGE, HEAD_RANGE


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in fp32 at least.

    With ``offset`` the weight is 1 + weight.
    """

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = config.norm_epsilon
        self.offset = config.norm_offset

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, OnHost):
            return rowwise(self, x)
        return rms_norm(x, self.weight, self.epsilon, offset=self.offset)

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum), in one pass."""
        return add_rms_norm(x, residual, self.weight, self.epsilon, offset=self.offset)


class SelfAttention(nn.Module):
    """Projections, norms and rotary embeddings around a causal attention function."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.head_dim = config.head_dim
        query_size = config.num_heads * config.head_dim
        key_size = config.num_kv_heads * config.head_dim
        self.query = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.key = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.value = nn.Linear(config.hidden_size, key_size, bias=config.qkv_bias)
        self.output = nn.Linear(query_size, config.hidden_size, bias=config.output_bias)
        self.sinks: nn.Parameter | None = None
        if config.attention_sinks:
            self.sinks = nn.Parameter(torch.empty(config.num_heads))
        self.query_norm: RMSNorm | None = None
        self.key_norm: RMSNorm | None = None
        self.norms_heads = config.qk_norm == "head"
        if config.qk_norm != "none":
            head = self.head_dim if self.norms_heads else None
            self.query_norm = RMSNorm(head or query_size, config)
            self.key_norm = RMSNorm(head or key_size, config)

    def project(
        self, x_BSD: Tensor, cos: Tensor, sin: Tensor, queries: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Queries (if wanted), keys and values, [B, S, D] -> [B, S, heads, E] each."""
        rotated_in_place = {"copy": self.key_norm is None}
        k_BSKE = self._heads(linear(self.key, x_BSD, KEYS, **rotated_in_place), self.key_norm)
        v_BSKE = self._heads(linear(self.value, x_BSD, KEYS), None)
        if not queries:
            return None, rope(k_BSKE[:, :, :0], k_BSKE, cos, sin)[1], v_BSKE
        queries_BSQ = linear(self.query, x_BSD, QUERIES, **rotated_in_place)
        q_BSHE = self._heads(queries_BSQ, self.query_norm)
        q_BSHE, k_BSKE = rope(q_BSHE, k_BSKE, cos, sin)
        return q_BSHE, k_BSKE, v_BSKE

    def _heads(self, projected: Tensor, norm: RMSNorm | None) -> Tensor:
        """[B, S, heads * E] -> [B, S, heads, E], normed if there is a norm."""
        if norm is not None and not self.norms_heads:
            projected = norm(projected)
        heads = projected.unflatten(-1, (-1, self.head_dim))
        return norm(heads) if norm is not None and self.norms_heads else heads


class MLP(nn.Module):
    """A gated MLP: down(activation(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, policy: Policy, values: bool = True) -> Tensor:
        """[B, S, D] -> [B, S, D]. values: as ``mini_sequence_mlp`` takes it."""
        weights = (self.gate.weight, self.up.weight, self.down.weight)
        if policy.mini_sequence:
            return mini_sequence_mlp(
                x_BSD,
                *weights,
                chunk_tokens=policy.mlp_chunk_tokens,
                activation=self.activation,
                values=values,
            )
        return gated_mlp(x_BSD, *weights, activation=self.activation)


class Head(nn.Linear):
    """The LM head, without bias: [..., D] -> logits [..., V], or what ``read`` makes of both.

    Its weight is read in this call and in its backward alone, so that it may be elsewhere the rest
    of the time.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: Tensor, read: Callable[..., Any] = F.linear) -> Any:
        """read: takes hidden and weight [V, D]."""
        return read(hidden, self.weight)


class Block(nn.Module):
    """One decoder layer: attention, then MLP or experts, each added to the residual stream.

    Two parts that treat each token by itself, around attention (``mst.RowwiseBlock``). A norm that
    ``norm_placement`` does without is None.
    """

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        before = config.norm_placement in ("before", "around")
        after = config.norm_placement in ("after", "around")
        size = config.hidden_size
        self.attention_norm = RMSNorm(size, config) if before else None
        self.attention = SelfAttention(config, attention)
        self.attention_output_norm = RMSNorm(size, config) if after else None
        self.mlp_norm = RMSNorm(size, config) if before else None
        self.mlp = MLP(config) if config.num_experts is None else Experts(config)
        self.mlp_output_norm = RMSNorm(size, config) if after else None
        self.policy = Policy()
        self.keep: frozenset[str] = frozenset()

    def forward(
        self,
        x_BSD: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: Documents | None,
        offload: Offload | None = None,
    ) -> Tensor:
        """[B, S, D] -> [B, S, D], under the policy.

        Whatever the policy, the block's weights are read in this call and in its backward alone,
        so that they may be elsewhere the rest of the time.
        """
        policy, attention = self.policy, self.attention.attention
        arguments = (cos, sin, documents)
        if not policy.recompute:
            return self._at_once(x_BSD, *arguments)
        if not policy.mini_sequence:  # the standard implementation
            losses, _ = router_losses_here()
            return checkpoint(
                self._at_once,
                x_BSD,
                *arguments,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), router_losses.again(losses)),
            )
        if not isinstance(attention, KernelAttention):  # which cannot attend chunk by chunk
            return recompute_block(
                self._at_once, x_BSD, *arguments, keep=self.keep, offload=offload
            )
        return mini_sequence_block(
            self,
            attention.kernel,
            x_BSD,
            (cos, sin),
            documents=documents,
            chunk_tokens=policy.block_chunk_tokens,
            keep=self.keep,
            offload=offload,
            stream=True,
            sharing=attention.sharing,
            sinks=self.attention.sinks,
        )

    def _at_once(
        self, x_BSD: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None
    ) -> Tensor:
        q_BSHE, k_BSKE, v_BSKE = self.before_attention(x_BSD, cos, sin)
        assert q_BSHE is not None
        qkv, sinks = (q_BSHE, k_BSKE, v_BSKE), self.attention.sinks
        out_BSHE = self.attention.attention(*qkv, documents, sinks)
        stream_BSD, branch_BSD = self.after_attention(x_BSD, out_BSHE)
        return stream_BSD + branch_BSD

    def before_attention(
        self, x_BSD: Tensor, cos: Tensor, sin: Tensor, *, queries: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """[B, S, D] -> q [B, S, H, E] (None without ``queries``), k and v [B, S, K, E]."""
        if self.attention_norm is not None:
            x_BSD = self.attention_norm(x_BSD)
        return self.attention.project(x_BSD, cos, sin, queries)

    def after_attention(
        self, x_BSD: Tensor, out_BSHE: Tensor, *, values: bool = True
    ) -> tuple[Tensor, Tensor]:
        """[B, S, D], [B, S, H, E] -> the residual and the MLP's branch, [B, S, D] each."""
        attention_BSD = linear(self.attention.output, out_BSHE.flatten(2), OUTPUT)
        if self.attention_output_norm is not None:
            attention_BSD = self.attention_output_norm(attention_BSD)
        if self.mlp_norm is not None:
            mlp_input_BSD, stream_BSD = self.mlp_norm.after_adding(attention_BSD, x_BSD)
        else:
            mlp_input_BSD = stream_BSD = attention_BSD + x_BSD
        if self.mlp_output_norm is None:
            return stream_BSD, self.mlp(mlp_input_BSD, self.policy, values)
        branch_BSD = self.mlp(mlp_input_BSD, self.policy)
        return stream_BSD, self.mlp_output_norm(branch_BSD)


class Transformer(nn.Module):
    """A decoder language model.

    ``policy`` and ``offload`` may be replaced between steps: they change what the model keeps,
    where, and what it recomputes, never its result. ``expert_load``: what share of the last batch's
    tokens and choices each expert got, [E] in fp64; None without experts.
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
        self.expert_load: Tensor | None = None
        self._sharing = attention.sharing if isinstance(attention, KernelAttention) else None
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        scores = (config.attention_softcap, config.attention_scale, config.attention_sinks)
        self.blocks = nn.ModuleList(
            Block(config, attention.of(Scores(window, *scores)))
            for window in map(config.window, range(config.num_layers))
        )
        self.norm = RMSNorm(config.hidden_size, config)
        self.head = Head(config)
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
        blocks = [*self._decoder_blocks()]
        for place, block in enumerate(blocks):
            block.policy, block.keep = policy, policy.kept_in(place, len(blocks))

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
            loss_sum: fp32 scalar (fp64 for an fp64 model), the sum over valid tokens; with experts,
                the routers' losses added for each of them (mst/router_losses.py).
            valid_tokens: int64 scalar.
        """
        self.expert_load = None
        losses = self._router_losses(tokens.device)
        with router_losses.first(losses):
            hidden_ND = self.hidden(tokens, positions, documents).flatten(0, 1)
        labels_N = labels.flatten()
        loss: Callable[..., tuple[Tensor, Tensor]] = cross_entropy
        if self.policy.mini_sequence:
            chunk_tokens = self.policy.head_chunk_tokens
            loss = partial(mini_sequence_cross_entropy, chunk_tokens=chunk_tokens)
        with record_function(HEAD_RANGE):
            softcap = self.config.logit_softcap
            loss_sum, valid_tokens = self.head(
                hidden_ND, partial(loss, labels=labels_N, softcap=softcap)
            )
        if losses is not None:
            sum_over_sequence = None if self._sharing is None else self._sharing.sum
            loss_sum = losses.added(loss_sum, valid_tokens, sum_over_sequence)
            self.expert_load = losses.load_E
        return loss_sum, valid_tokens

    def _router_losses(self, device: torch.device) -> RouterLosses | None:
        config = self.config
        if config.num_experts is None:
            return None
        coefficients = (config.balance_loss, config.router_z_loss)
        return RouterLosses(config.num_experts, device, *coefficients)

    def logits(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """The logits of every token, [B, S] int64 -> [B, S, V] in the model's type."""
        return self.head_logits(self.hidden(tokens, positions))

    def head_logits(self, hidden: Tensor) -> Tensor:
        """The head's logits, [..., D] as ``hidden`` gives them -> [..., V]."""
        logits = self.head(hidden)
        softcap = self.config.logit_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    @torch.no_grad()
    def token_losses(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """The cross-entropy of each token, [B, S] in fp32 (fp64 for an fp64 model).

        Arguments as in ``forward``, which gives their sum. 0 where there is nothing to predict.
        Without gradients; whatever the policy, the head goes through the tokens in chunks.
        """
        hidden_ND = self.hidden(tokens, positions, documents).flatten(0, 1)
        with record_function(HEAD_RANGE):
            losses = partial(
                mini_sequence_losses,
                labels=labels.flatten(),
                chunk_tokens=self.policy.head_chunk_tokens,
                softcap=self.config.logit_softcap,
            )
            losses_N = self.head(hidden_ND, losses)
        return losses_N.view_as(labels)

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
        if self.config.scale_embeddings:
            x_BSD = x_BSD * self._embedding_scale(x_BSD.dtype)
        cos, sin = rotary_angles(positions, self.config, x_BSD.dtype)
        for block in self._decoder_blocks():
            with record_function(BLOCK_RANGE):
                x_BSD = block(x_BSD, cos, sin, documents, self.offload)
        return self.norm(x_BSD)

    def _embedding_scale(self, dtype: torch.dtype) -> float:
        """sqrt(D) as Gemma's implementations round it: to fp32 and then to ``dtype``."""
        scale = torch.tensor(math.sqrt(self.config.hidden_size), dtype=torch.float32)
        return scale.to(dtype).item()

    def _decoder_blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    @torch.no_grad()
    def init_weights(self, name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
        """Draw the parameter of this name anew.

        Matrices are normal with standard deviation ``initializer_std``; those that write to the
        residual stream are scaled by 1/sqrt(2 * layers), so that the stream's variance does not
        grow with depth (GPT-2, section 2.3). Norms start as multiplying by one, biases at zero;
        sinks are drawn as matrices are (gpt-oss).
        """
        std = self.config.initializer_std
        if parameter.ndim == 1 and not name.endswith(".sinks"):
            is_zero = name.endswith("bias") or self.config.norm_offset
            parameter.fill_(0.0 if is_zero else 1.0)
            return
        if name.endswith(("attention.output.weight", "mlp.down.weight", "mlp.down")):
            std /= math.sqrt(2 * self.config.num_layers)
        parameter.normal_(0.0, std, generator=generator)


def build_model(
    config: ModelConfig,
    *,
    policy: Policy | None = None,
    attention: Attention = reference_attention,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    partition: Callable[[nn.Module], object] | None = None,
) -> Transformer:
    """A freshly initialised decoder, created in its own type on its own device.

    On the "meta" device the parameters have shapes and no values.

    partition: called with each module that has parameters of its own, as soon as these have values;
        if it keeps parts of them alone, the whole model is never in one place.
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
    generator = torch.Generator(device).manual_seed(seed)
    for module, parameters in _materialized(model, device):
        for name, parameter in parameters.items():
            model.init_weights(name, parameter, generator)
        if partition is not None:
            partition(module)
    return model


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Give every parameter memory on ``device``, without values; a tied one once."""
    for _ in _materialized(model, device):
        pass


def _materialized(
    model: nn.Module, device: torch.device | str
) -> Iterator[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """``materialize`` module by module: each with what is new in it, by its name in the model.

    A module comes after those inside it, which then have values.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in _inside_out(model):
        new = {}
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device))
                new[f"{prefix}.{name}"] = made[parameter]
            setattr(module, name, made[parameter])
        if new:
            yield module, new


def _inside_out(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` in the order in which a module comes after those inside it."""
    for name, child in module.named_children():
        yield from _inside_out(child, f"{prefix}.{name}" if prefix else name)
    yield prefix, module
