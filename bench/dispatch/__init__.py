"""What a GPU would see of one optimizer step, counted on any machine: `python -m bench.dispatch SHAPE`."""
