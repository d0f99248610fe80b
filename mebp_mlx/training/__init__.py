"""A training run: set-up from options, the loop, logs, saves, resuming."""
