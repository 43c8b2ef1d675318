"""The decoder: its layers, its attention, its checkpoints in others' format and what it costs."""

from mst_train.model.attention import Attention, select_attention
from mst_train.model.transformer import Transformer, build_model

__all__ = ["Attention", "Transformer", "build_model", "select_attention"]
