"""Checkpoints in the format of Hugging Face transformers.

weights    folders of safetensors, read and written
names      what parameters are called in them
config     their config.json and this project's settings, both ways
families   the table of the models that are supported
"""
