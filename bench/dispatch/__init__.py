"""Counts of one optimizer step on a GPU, made on any machine: `python -m bench.dispatch SHAPE`."""
