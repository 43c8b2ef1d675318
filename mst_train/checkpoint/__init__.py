"""A run's state on disk: whole or not there, in whole tensors, written beside the steps."""
