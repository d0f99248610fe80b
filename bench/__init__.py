"""Measurements: `python -m bench.NAME` prints a table, and JSON as its last line."""
