"""Helpers for tests and benchmarks; nothing else in mebp_mlx imports them.

synth.py: models of real shapes with random weights, written by streaming. tiny.py: small random models of every
family, built with mlx-lm's own classes. reference.py: mlx-lm's model and autograd, the reference for our gradients.
"""
