"""Weights on disk: memory-mapped reading, streamed writing, and downloads from the hub."""
