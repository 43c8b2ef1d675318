"""What a run reports: metrics.jsonl, summary.json, W&B and the terminal."""
