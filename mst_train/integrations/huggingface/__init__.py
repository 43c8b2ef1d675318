"""The method inside models of Hugging Face transformers."""

from mst_train.integrations.huggingface.apply import apply_mini_sequence, remove_mini_sequence

__all__ = ["apply_mini_sequence", "remove_mini_sequence"]
