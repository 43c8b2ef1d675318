"""What a run reports while it goes on.

metrics     records in metrics.jsonl, summary.json, the terminal
wandb_run   the same in Weights & Biases: names, summary, checkpoints by choice
"""
