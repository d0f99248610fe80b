"""exp and tanh on the CPU through numpy's vector loops: the head's exp, the gates and attention's softmax.

MLX's CPU backend takes exp and tanh one number at a time (0.35 GB/s where numpy reaches 6), and its exp is off by up
to 4e-6 of the value far below zero. In float32 on the CPU only; elsewhere the plain MLX functions are used. Results go
into the arrays' own memory, in pieces that stay in a core's cache. Two threads gained nothing (bench/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..model.head import Step
from ..model.unpack import buffer_of, empty, in_pieces, on_cpu

Forward = Callable[[np.ndarray, np.ndarray], None]
Backward = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
_PIECE_ITEMS = 32 << 10


def serves(*arrays: mx.array) -> bool:
    """Whether these arrays are worked on here."""
    return on_cpu() and all(array.dtype == mx.float32 for array in arrays)


def online_softmax(
    z: mx.array, maximum: mx.array, total: mx.array, target_logit: mx.array, targets: mx.array, first: int
) -> Step:
    """As the kernel of that name, p in z's own memory; z must belong to the caller alone."""
    mx.eval(z, maximum)
    values, before, column = buffer_of(z), buffer_of(maximum), np.asarray(targets) - first
    (highest, highest_out), (sums, sums_out), (picked, picked_out) = (empty(len(values)) for _ in range(3))
    picked_out[:] = np.asarray(target_logit)
    here = np.flatnonzero((column >= 0) & (column < values.shape[1]) & (np.asarray(targets) >= 0))
    picked_out[here] = values[here, column[here]]

    def run(rows: slice) -> None:
        piece = values[rows]
        np.maximum(before[rows], piece.max(axis=-1), out=highest_out[rows])
        np.subtract(piece, highest_out[rows, None], out=piece)
        np.exp(piece, out=piece)
        piece.sum(axis=-1, out=sums_out[rows])

    with np.errstate(all="ignore"):  # a logit that is no number shows in the loss
        in_pieces(len(values), values.shape[1], _PIECE_ITEMS, run)
    shrink = mx.exp(maximum - highest)
    return Step(z, highest, total * shrink + sums, picked, shrink)


def gate_forward(run: Forward, g: mx.array, u: mx.array, in_place: bool) -> mx.array:
    """act(g) * u, in g's own memory if that is the caller's alone."""
    mx.eval(g, u)
    if not in_place:
        (m, out), source = empty(*g.shape), buffer_of(g)
        out[:] = source
        g = m
    flat = [buffer_of(array).reshape(-1) for array in (g, u)]
    with np.errstate(all="ignore"):
        in_pieces(g.size, 1, _PIECE_ITEMS, lambda part: run(*(values[part] for values in flat)))
    return g


def gate_backward(run: Backward, g: mx.array, u: mx.array, dm: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """(act(g) * u, dg, du) in the memory of (dm, g, u), which must be the caller's alone."""
    mx.eval(g, u, dm)
    flat = [buffer_of(array).reshape(-1) for array in (g, u, dm)]
    with np.errstate(all="ignore"):
        in_pieces(g.size, 1, _PIECE_ITEMS, lambda part: run(*(values[part] for values in flat)))
    return dm, g, u


def softmax(scores: mx.array, hidden: np.ndarray | None) -> mx.array:
    """softmax over the last axis of scores [..., Tq, Tk], in their own memory; hidden [Tq, Tk]: True is left out."""
    mx.eval(scores)
    values = buffer_of(scores).reshape(-1, *scores.shape[-2:])
    n, n_queries, n_keys = values.shape

    def run(part: slice) -> None:
        for piece, rows in _rows_of(values, part, n_queries):
            if hidden is not None:
                np.copyto(piece, -np.inf, where=hidden[rows])
            piece -= piece.max(axis=-1, keepdims=True)
            np.exp(piece, out=piece)
            piece /= piece.sum(axis=-1, keepdims=True)

    with np.errstate(all="ignore"):
        in_pieces(n * n_queries, n_keys, _PIECE_ITEMS, run)
    return scores


def softmax_backward(p: mx.array, dp: mx.array, scale: float) -> mx.array:
    """scale * p (dp - sum(p dp)) over the last axis, in dp's own memory."""
    mx.eval(p, dp)
    values, cotangents = (buffer_of(array).reshape(-1, array.shape[-1]) for array in (p, dp))

    def run(rows: slice) -> None:
        piece, cotangent = values[rows], cotangents[rows]
        inner = np.einsum("ij,ij->i", piece, cotangent)[:, None]
        cotangent -= inner
        cotangent *= piece
        cotangent *= scale

    with np.errstate(all="ignore"):
        in_pieces(*values.shape, _PIECE_ITEMS, run)
    return dp


def _rows_of(values: np.ndarray, part: slice, n_queries: int) -> list[tuple[np.ndarray, slice]]:
    """The rows `part` of values [n, Tq, Tk] counted over the first two axes, cut where a first index ends."""
    found, at = [], part.start
    while at < part.stop:
        head_index, row = divmod(at, n_queries)
        last = min(n_queries, row + part.stop - at)
        found.append((values[head_index, row:last], slice(row, last)))
        at += last - row
    return found


def _sigmoid(g: np.ndarray) -> np.ndarray:
    s = np.exp(-g)
    s += 1
    return np.reciprocal(s, out=s)


def silu(g: np.ndarray, u: np.ndarray) -> None:
    """g becomes silu(g) u."""
    s = _sigmoid(g)
    g *= s
    g *= u


def silu_backward(g: np.ndarray, u: np.ndarray, c: np.ndarray) -> None:
    """(g, u, dm) become (dg, du, m)."""
    s = _sigmoid(g)
    act = g * s
    slope = s + act * (1 - s)
    slope *= u
    slope *= c  # dg
    np.multiply(act, u, out=g)  # m, for a moment
    np.multiply(act, c, out=u)  # du
    c[:] = g
    g[:] = slope


def _tanh_of_gelu(g: np.ndarray, square: np.ndarray) -> np.ndarray:
    inner = _GELU * g * (1 + _CUBIC * square)
    return np.tanh(inner, out=inner)


def gelu_tanh(g: np.ndarray, u: np.ndarray) -> None:
    """g becomes gelu(g) u, with gelu's tanh approximation."""
    t = _tanh_of_gelu(g, g * g)
    t += 1
    g *= t
    g *= u
    g *= 0.5


def gelu_tanh_backward(g: np.ndarray, u: np.ndarray, c: np.ndarray) -> None:
    """(g, u, dm) become (dg, du, m)."""
    square = g * g
    t = _tanh_of_gelu(g, square)
    half = 0.5 * (1 + t)
    slope = half + (0.5 * _GELU) * g * (1 - t * t) * (1 + 3 * _CUBIC * square)
    slope *= u
    slope *= c  # dg
    act = g * half
    np.multiply(act, u, out=g)
    np.multiply(act, c, out=u)
    c[:] = g
    g[:] = slope


_GELU, _CUBIC = np.float32(0.7978845608028654), np.float32(0.044715)
