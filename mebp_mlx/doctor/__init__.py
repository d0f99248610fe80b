"""`python -m mebp_mlx.doctor`: describes this machine and checks everything that the trainer relies on."""
