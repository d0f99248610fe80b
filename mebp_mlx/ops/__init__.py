"""Equations with their gradients: each file has an operation's forward and backward side by side.

Nothing here evaluates a graph but cpu.py; barrier.py says where the engine does.
"""
