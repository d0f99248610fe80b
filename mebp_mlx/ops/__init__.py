"""Equations with their gradients: each file has an operation's forward and backward side by side.

plan.py says where a graph is evaluated. Beside it only numpy's loops (kernels/cpu.py) evaluate what they work on.
"""
