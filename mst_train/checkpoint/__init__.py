"""A run's state on disk: whole or not there, in whole tensors, written beside the steps.

files    checkpoints as folders of files: written, found, checked, read
form     whether what they hold is what a run takes over
writer   a thread that writes them while training goes on
trained  the model of one, or of a Hugging Face checkpoint, for commands that only read it
"""
