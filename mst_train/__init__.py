"""Exact long-context pretraining with the Mini-Sequence Transformer.

The method is ``mst_train.mst``, which needs torch alone; ``mst_train.integrations`` puts it into
others' models. The rest is a framework that trains with it: docs/architecture.md has its parts.
"""

__version__ = "0.1.0"
