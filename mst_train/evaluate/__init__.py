"""What a model has learned, and whether it uses its context: python -m mst_train.evaluate.

checkpoint       a run's checkpoint, or a Hugging Face one, evaluated without training
validation       the loss of what is held out, and of each set that has a name
tasks            long texts whose end asks for what is in them: which there are, and what is drawn
passkey          a number hidden in filler, asked for at its end
needles          numbers that belong to keys, and chains of variables, after RULER
words            the most frequent words of a list, after RULER
vocabulary       the words of all these
probe            such a text in tokens, as long as asked for, and what chance would answer
scores           how many of them a model answers
show             all of it as tables
plot             the tasks as a picture
write_tasks      the command that writes such texts to learn from
word_tokenizer   a tokenizer for them alone

The training run records the same: ``engine.positions`` has the validation loss by position.
"""
