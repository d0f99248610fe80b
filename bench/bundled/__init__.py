"""Makes the bundled model and data: `python -m bench.bundled`. No measurement; see mebp_mlx/bundled/README.md."""
