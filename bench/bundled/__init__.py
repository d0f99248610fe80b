"""Makes the bundled model and data: `python -m bench.bundled`. Not a measurement; see mebp_mlx/bundled/README.md."""
