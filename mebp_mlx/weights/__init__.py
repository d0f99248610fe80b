"""Weights on disk: read through mapped files, written a tensor at a time, quantized, fetched from a hub."""
