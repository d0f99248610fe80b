"""Text from a model, through mlx-lm. The training process runs this in a child."""
