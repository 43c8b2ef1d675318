"""What a step holds in memory: measured, and bounded from below before it starts."""
