"""Measurements: the method beside other ways to do the same work.

    python -m mst_train.bench +bench=NAME [key=value ...]

step           whole training steps under each memory policy
short          the same at lengths that do not need the method
systems        whole steps of this project, transformers, DeepSpeed's ALST and Liger
peers          the LM head and the MLP alone, as others implement them
max_sequence   the longest sequence that fits under each policy, beside the prediction

``config`` has the settings of this command. ``measure`` times and weighs the variants of one piece
of ``workload``, ``progress`` shows how far it is; ``report`` and ``plot`` are for the result.
"""
