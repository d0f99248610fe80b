"""Runs that are stopped in every way and resumed, and damaged files: `python -m bench.torture`."""
