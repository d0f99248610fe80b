"""Measurements: `python -m bench` lists them. Each prints a table, and JSON as its last line."""
