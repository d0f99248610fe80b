"""Stops and resumes runs in every way, and damages files: `python -m bench.torture`."""
