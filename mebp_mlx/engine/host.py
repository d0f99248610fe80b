"""Elementwise functions with exp or tanh in them, on the CPU through numpy's vector loops.

MLX's CPU backend calls exp and tanh one number at a time (0.35 and 0.25 GB/s where numpy reaches 8), which took a
fifth of the head's time and as much of an MLP's activation. In float32 on the CPU only; elsewhere the plain MLX
functions are used. Work goes in pieces that stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from ..model.unpack import buffer_of, empty, on_cpu

Gate = Callable[[np.ndarray, np.ndarray], np.ndarray]
GateBackward = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
_PIECE_ITEMS = 32 << 10


def usable(*arrays: mx.array) -> bool:
    """Whether these arrays can be worked on here."""
    return on_cpu() and all(array.dtype == mx.float32 for array in arrays)


def exp_minus(z: mx.array, maximum: mx.array) -> tuple[mx.array, mx.array]:
    """(exp(z - maximum) [N, C] in z's own memory, its row sums [N, 1]); z must belong to the caller alone."""
    if not usable(z, maximum):
        p = mx.exp(z - maximum)
        return p, p.sum(axis=-1, keepdims=True)
    mx.eval(z, maximum)
    values, shift = buffer_of(z), buffer_of(maximum)
    total, sums = empty(z.shape[0], 1)
    with np.errstate(all="ignore"):  # a logit that is no number shows in the loss
        for rows in _pieces(*z.shape):
            piece = values[rows]
            np.subtract(piece, shift[rows], out=piece)
            np.exp(piece, out=piece)
            sums[rows] = piece.sum(axis=-1, keepdims=True)
    return z, total


def gate(kind: str, g: mx.array, u: mx.array) -> mx.array:
    """act(g) * u for evaluated arrays of the same shape; kind: "silu", or "gelu" in its tanh approximation."""
    result, out = empty(*g.shape)
    run = _GATES[kind][0]
    flat_g, flat_u, flat_out = (_flat(a) for a in (np.asarray(g), np.asarray(u), out))
    with np.errstate(all="ignore"):
        for rows in _pieces(*flat_g.shape):
            flat_out[rows] = run(flat_g[rows], flat_u[rows])
    return result


def gate_backward(kind: str, g: mx.array, u: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    """The cotangents of g and u from that of act(g) * u, all evaluated."""
    (dg, out_g), (du, out_u) = empty(*g.shape), empty(*g.shape)
    run = _GATES[kind][1]
    flat = [_flat(np.asarray(a)) for a in (g, u, cotangent)]
    flat_dg, flat_du = _flat(out_g), _flat(out_u)
    with np.errstate(all="ignore"):
        for rows in _pieces(*flat[0].shape):
            flat_dg[rows], flat_du[rows] = run(*(a[rows] for a in flat))
    return dg, du


def _silu(g: np.ndarray, u: np.ndarray) -> np.ndarray:
    return g * _sigmoid(g) * u


def _silu_backward(g: np.ndarray, u: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s = _sigmoid(g)
    gs = g * s
    return c * u * (s + gs * (1 - s)), c * gs


def _sigmoid(g: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-g))


def _gelu(g: np.ndarray, u: np.ndarray) -> np.ndarray:
    return 0.5 * g * (1 + _gelu_tanh(g, g * g)) * u


def _gelu_backward(g: np.ndarray, u: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    square = g * g
    t = _gelu_tanh(g, square)
    half = 0.5 * (1 + t)
    slope = 0.5 * _GELU * g * (1 - t * t) * (1 + 3 * _CUBIC * square)
    return c * u * (half + slope), c * g * half


def _gelu_tanh(g: np.ndarray, square: np.ndarray) -> np.ndarray:
    return np.tanh(_GELU * g * (1 + _CUBIC * square))


_GELU, _CUBIC = 0.7978845608028654, 0.044715
_GATES: dict[str, tuple[Gate, GateBackward]] = {
    "silu": (_silu, _silu_backward),
    "gelu": (_gelu, _gelu_backward),
}


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, values.shape[-1])


def _pieces(n_rows: int, width: int) -> Iterator[slice]:
    step = max(1, _PIECE_ITEMS // max(width, 1))
    for start in range(0, n_rows, step):
        yield slice(start, start + step)
