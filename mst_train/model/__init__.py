"""The decoder: its layers, how it computes, its checkpoints in others' format and what it costs.

transformer   the decoder, in the form of every family that ``ModelConfig`` describes
experts       a block's mixture of experts
rope          rotary embeddings, and how they are stretched to longer sequences
policy        what ``memory.policy`` means for the pieces of a step
flops         parameters, and what training computes
hf            checkpoints in Hugging Face's format
"""

from mst_train.model.policy import Policy
from mst_train.model.transformer import Transformer, build_model

__all__ = ["Policy", "Transformer", "build_model"]
