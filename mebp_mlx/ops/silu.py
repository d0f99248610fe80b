"""silu(x) = x s, s = sigmoid(x);   dx = g s (1 + x (1 - s)).   Also exp(x). numpy computes both if it is faster."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..kernels import cpu


def exp(x: mx.array) -> mx.array:
    """exp(x) in x's dtype."""
    return cpu.pointwise(np.exp, x) if cpu.serves(x) else mx.exp(x)


def silu(x: mx.array) -> mx.array:
    """silu(x) in x's dtype."""
    return cpu.pointwise(_silu, x) if cpu.serves(x) else x * mx.sigmoid(x)


def backward(x: mx.array, g: mx.array) -> mx.array:
    """dL/dx from g = dL/d silu(x)."""
    if cpu.serves(x, g):
        return cpu.pointwise(_backward, x, g)
    s = mx.sigmoid(x)
    return g * s * (1 + x * (1 - s))


def _silu(x: np.ndarray, out: np.ndarray) -> None:
    np.exp(-x, out=out)
    out += 1
    np.divide(x, out, out=out)


def _backward(x: np.ndarray, g: np.ndarray, out: np.ndarray) -> None:
    np.exp(-x, out=out)
    out += 1
    np.reciprocal(out, out=out)
    slope = x * (1 - out)
    slope += 1
    out *= slope
    out *= g
