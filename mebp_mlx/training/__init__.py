"""A training run: set up from options, stepped, logged, saved, resumed."""
