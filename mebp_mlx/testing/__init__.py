"""What tests and benchmarks both need; nothing else in mebp_mlx imports it.

synth.py: models of real shapes with random weights, written by streaming. tiny.py: small random models of every
family, built by mlx-lm's own classes. reference.py: mlx-lm's model and autograd, which ours is compared with.
"""
