"""The method inside models of Hugging Face transformers.

apply     putting it into a model, and taking it out
forward   what the model's modules do then
layers    decoder layers as row-wise blocks; the table of models that have them
head      the LM head and the loss
calls     whether a module is as its package wrote it, or somebody's change would be left out
"""

from mst_train.integrations.huggingface.apply import apply_mini_sequence, remove_mini_sequence

__all__ = ["apply_mini_sequence", "remove_mini_sequence"]
