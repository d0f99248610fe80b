"""Models for other programs to read."""
