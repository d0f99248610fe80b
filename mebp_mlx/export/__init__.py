"""Writes models and adapters in formats that other programs read."""
