"""What a memory policy means for the pieces of a step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from mst_train.config import ALL, AUTO, KeepConfig, MemoryConfig, ModelConfig
from mst_train.mst import ATTENTION, PIECES
from mst_train.mst.chunking import BLOCK_BYTES, resolve_chunk_tokens
from mst_train.mst.mini_sequence_experts import working_features
from mst_train.mst.mlp import BACKWARD_INTERMEDIATES


@dataclass(frozen=True)
class Policy:
    """How a decoder computes: which intermediates exist, and in what portions.

    recompute: keep only each block's input for the backward, and run the block again.
    mini_sequence: MLP and LM head go through the tokens in chunks; with recompute, whole blocks do,
        and what is run again computes only what the backward reads.
    mlp_chunk_tokens, head_chunk_tokens, block_chunk_tokens: tokens in a chunk, or "auto".
    keep: with both of the above, the names of results that blocks keep (mst/kept.py), each with the
        number of blocks that do, counted from the last, or "all".
    """

    recompute: bool = False
    mini_sequence: bool = False
    mlp_chunk_tokens: int | str = AUTO
    head_chunk_tokens: int | str = AUTO
    keep: Mapping[str, int | str] = field(default_factory=lambda: {ATTENTION: ALL})
    block_chunk_tokens: int | str = AUTO

    @classmethod
    def from_config(cls, memory: MemoryConfig) -> "Policy":
        """The policy that ``memory.policy`` names."""
        return cls(
            recompute=memory.policy in ("recompute", "mst"),
            mini_sequence=memory.policy == "mst",
            mlp_chunk_tokens=memory.mlp_chunk_tokens,
            head_chunk_tokens=memory.head_chunk_tokens,
            keep=_kept(memory.keep),
            block_chunk_tokens=memory.block_chunk_tokens,
        )

    def kept_in(self, block: int, blocks: int) -> frozenset[str]:
        """What this one of so many blocks keeps."""
        return frozenset(n for n, count in self.keep.items() if _blocks(count) >= blocks - block)

    def resolved(
        self,
        model: ModelConfig,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        whole_blocks: bool,
    ) -> "Policy":
        """The same policy with the numbers that "auto" stands for.

        Those that the mini-sequence functions choose for a batch [B, S] of this type on a device of
        this type. whole_blocks: the attention is one that cannot attend chunk by chunk.
        """
        size = dtype.itemsize
        batch, sequence = shape
        tokens = batch * sequence
        block = resolve_chunk_tokens(
            self.block_chunk_tokens,
            tokens,
            2 * _product_features(model) * size,
            device,
            BLOCK_BYTES,
        )
        mlp_bytes = _mlp_features(model) * size
        in_chunks = self.recompute and self.mini_sequence and not whole_blocks
        at_once = min(-(-block // batch) * batch, tokens) if in_chunks else tokens
        return replace(
            self,
            block_chunk_tokens=block,
            mlp_chunk_tokens=resolve_chunk_tokens(
                self.mlp_chunk_tokens, at_once, mlp_bytes, device
            ),
            head_chunk_tokens=resolve_chunk_tokens(
                self.head_chunk_tokens, tokens, model.vocab_size * size, device
            ),
        )


def _kept(keep: KeepConfig) -> dict[str, int | str]:
    """With what "auto" stands for where a policy is named."""
    auto: dict[str, int | str] = dict.fromkeys(PIECES, 0) | {ATTENTION: ALL}
    asked = {name: getattr(keep, name) for name in PIECES}
    return {name: auto[name] if asked[name] == AUTO else asked[name] for name in PIECES}


def _blocks(count: int | str) -> float:
    return math.inf if count == ALL else int(count)


def _product_features(model: ModelConfig) -> int:
    """Features of all the products in a block, per token."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = queries + 2 * keys + model.hidden_size
    mlp = 2 * model.intermediate_size + model.hidden_size
    if model.num_experts is None:
        return attention + mlp
    return attention + model.num_experts + model.experts_per_token * mlp


def _mlp_features(model: ModelConfig) -> int:
    """Features of what the MLP's or the experts' backward holds, per token."""
    if model.num_experts is None:
        return BACKWARD_INTERMEDIATES * model.intermediate_size
    return working_features(model.hidden_size, model.intermediate_size, model.experts_per_token)
