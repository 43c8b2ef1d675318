"""What a model has learned, and whether it uses its context.

``positions``: the validation loss by position in the sequence. ``passkey``: a number hidden in a
long text, asked for at its end. The training run records both (``step.evaluate`` computes the
losses); ``python -m mst_train.evaluate`` does the same with a checkpoint (``checkpoint``) and shows
it (``show``).
"""
