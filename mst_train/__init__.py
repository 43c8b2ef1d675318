"""Exact long-context pretraining with the Mini-Sequence Transformer."""

__version__ = "0.1.0"
