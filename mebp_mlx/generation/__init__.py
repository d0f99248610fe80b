"""Generates text with mlx-lm. The training process runs this in a child process."""
