"""What a run reports while it goes on.

metrics     records in metrics.jsonl, summary.json, the terminal
names       what a record's numbers are called outside of it
tensorboard_run  the same for TensorBoard
wandb_run   the same in Weights & Biases: names, summary, checkpoints by choice
"""
