"""The method inside other frameworks' models.

huggingface   transformers
"""
