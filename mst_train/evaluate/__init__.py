"""What a model has learned, and whether it uses its context: python -m mst_train.evaluate.

checkpoint   a run's checkpoint, or a Hugging Face one, evaluated without training
validation   the loss of what is held out, and of each set that has a name
passkey      a number hidden in a long text, asked for at its end
show         both as tables

The training run records the same: ``engine.positions`` has the validation loss by position.
"""
