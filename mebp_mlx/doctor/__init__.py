"""`python -m mebp_mlx.doctor`: what this machine offers, and whether what the trainer relies on works here."""
