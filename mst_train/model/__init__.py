"""The decoder: its layers, how it computes, its checkpoints in others' format and what it costs."""

from mst_train.model.policy import Policy
from mst_train.model.transformer import Transformer, build_model

__all__ = ["Policy", "Transformer", "build_model"]
