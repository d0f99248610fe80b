"""Equations with their gradients: each file has an operation's forward and backward.

plan.py decides where a graph is evaluated. Apart from it, only numpy's loops (kernels/cpu.py) evaluate their inputs.
"""
