"""What a memory policy means for the pieces of a step."""

from dataclasses import dataclass

from mst_train.config import AUTO, MemoryConfig


@dataclass(frozen=True)
class Policy:
    """How a decoder computes: which intermediates exist, and in what portions.

    recompute: keep only each block's input for the backward, and run the block again.
    mini_sequence: MLP and LM head go through the tokens in chunks; with recompute, whole blocks do,
        and what is run again computes only what the backward reads.
    mlp_chunk_tokens, head_chunk_tokens, block_chunk_tokens: tokens in a chunk, or "auto".
    keep_attention: with both of the above, do not compute attention again.
    """

    recompute: bool = False
    mini_sequence: bool = False
    mlp_chunk_tokens: int | str = AUTO
    head_chunk_tokens: int | str = AUTO
    keep_attention: bool = True
    block_chunk_tokens: int | str = AUTO

    @classmethod
    def from_config(cls, memory: MemoryConfig) -> "Policy":
        """The policy that ``memory.policy`` names."""
        return cls(
            recompute=memory.policy in ("recompute", "mst"),
            mini_sequence=memory.policy == "mst",
            mlp_chunk_tokens=memory.mlp_chunk_tokens,
            head_chunk_tokens=memory.head_chunk_tokens,
            keep_attention=memory.keep_attention,
            block_chunk_tokens=memory.block_chunk_tokens,
        )
