"""Text from a model: python -m mst_train.generate.

decode   token after token: the decoder with the keys and values of what it has read
sample   which token follows
text     tokens to text, as they come
"""
