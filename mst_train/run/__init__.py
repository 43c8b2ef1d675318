"""A training run: the loop, where it stands, how it begins and how it ends."""
