"""Measurements: `python -m bench` lists them. Each prints a table, then one line of JSON."""
