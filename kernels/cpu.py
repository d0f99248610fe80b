"""Vectorized numpy loops for operations that are slow in MLX's CPU backend: dequantization, exp and tanh.

They are used only on the CPU in float32; otherwise plain MLX functions or Metal kernels are used. MLX's CPU backend
computes exp and tanh one number at a time (0.35 GB/s, numpy 6 GB/s), and its exp has a relative error of up to 4e-6 far
below zero. It dequantizes one weight at a time (0.65 GB/s of float32 on one core of an AVX-512 machine; this module is
six times as fast). Results go into the arrays' own memory, in pieces that fit in a core's cache. Two threads were no
faster (bench/LOG.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from .online_softmax import SoftmaxStep

Forward = Callable[[np.ndarray, np.ndarray], None]
Backward = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
BITS = (4, 8)  # bit widths that numpy dequantizes: they divide a byte
_PIECE_ITEMS = 32 << 10
_WEIGHT_PIECE_ITEMS = 64 << 10
_is_off = False


def is_on() -> bool:
    """Whether numpy may write into arrays: MLX computes on the CPU, and no graph is being traced."""
    return not _is_off and mx.default_device().type == mx.cpu


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Uses only MLX operations, for a graph that is differentiated or counted: numpy would evaluate it."""
    global _is_off
    before, _is_off = _is_off, True
    try:
        yield
    finally:
        _is_off = before


def serves(*arrays: mx.array) -> bool:
    """Whether numpy can process these arrays: on the CPU, float32."""
    return is_on() and all(array.dtype == mx.float32 for array in arrays)


def online_softmax(
    z: mx.array, maximum: mx.array, total: mx.array, target_logit: mx.array, targets: mx.array, first: int
) -> SoftmaxStep:
    """The kernel of that name (online_softmax.py) in numpy; p overwrites z, which the caller must own."""
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

    with np.errstate(all="ignore"):  # a NaN logit shows in the loss
        in_pieces(len(values), values.shape[1], _PIECE_ITEMS, run)
    shrink = mx.exp(maximum - highest)
    return SoftmaxStep(z, highest, total * shrink + sums, picked, shrink)


def pointwise(run: Callable[..., object], *arrays: mx.array) -> mx.array:
    """A fresh array of the arrays' shape, filled by run(*pieces, out=piece)."""
    mx.eval(*arrays)
    flat = [np.asarray(array).reshape(-1) for array in arrays]
    result, out = empty(*arrays[0].shape)
    out = out.reshape(-1)
    with np.errstate(all="ignore"):
        in_pieces(out.size, 1, _PIECE_ITEMS, lambda part: run(*(values[part] for values in flat), out=out[part]))
    return result


def gate_forward(run: Forward, g: mx.array, u: mx.array, in_place: bool) -> mx.array:
    """act(g) * u; overwrites g if in_place, which requires that the caller owns g."""
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
    """(act(g) * u, dg, du); they overwrite dm, g and u, which the caller must own."""
    mx.eval(g, u, dm)
    flat = [buffer_of(array).reshape(-1) for array in (g, u, dm)]
    with np.errstate(all="ignore"):
        in_pieces(g.size, 1, _PIECE_ITEMS, lambda part: run(*(values[part] for values in flat)))
    return dm, g, u


def softmax(scores: mx.array, hidden: np.ndarray | None) -> mx.array:
    """softmax over the last axis of scores [..., Tq, Tk], in place; hidden [Tq, Tk]: True masks a score."""
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
    """scale * p (dp - sum(p dp)) over the last axis; overwrites dp."""
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
    """Rows `part` of values [n, Tq, Tk], counted over the first two axes, split where the first index changes."""
    pieces, at = [], part.start
    while at < part.stop:
        head_index, row = divmod(at, n_queries)
        last = min(n_queries, row + part.stop - at)
        pieces.append((values[head_index, row:last], slice(row, last)))
        at += last - row
    return pieces


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
    np.multiply(act, u, out=g)  # m, temporarily
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


def buffer_of(array: mx.array) -> np.ndarray:
    """The memory of an evaluated float32 array, writable; only for arrays without other readers. CPU only."""
    memory: Any = array  # its type hints do not declare the buffer protocol
    return np.frombuffer(memoryview(memory).cast("B"), np.float32).reshape(array.shape)


def empty(*shape: int) -> tuple[mx.array, np.ndarray]:
    """A new float32 array and its memory, which must be filled before anything reads the array."""
    array = mx.zeros(shape)
    mx.eval(array)
    return array, buffer_of(array)


def dequantize(
    packed: mx.array | np.ndarray, scales: mx.array, biases: mx.array, bits: int, group_size: int
) -> mx.array:
    """scale * q + bias, float32 [n, in], for rows packed as uint32 [n, in * bits / 32], lowest bits first. The results
    equal those of mx.dequantize.

    scales, biases: float32 [n, in / group_size]; bits: one of BITS.
    """
    codes = np.asarray(packed).view(np.uint8)  # [n, in * bits / 8]
    scale, bias = (np.asarray(part)[..., None] for part in (scales, biases))
    n_rows, n_in = packed.shape[0], packed.shape[1] * 32 // bits
    result, out = empty(n_rows, n_in)

    def run(rows: slice) -> None:
        piece = out[rows]
        piece[:] = codes[rows] if bits == 8 else _nibbles(codes[rows])
        grouped = piece.reshape(len(piece), -1, group_size)
        np.multiply(grouped, scale[rows], out=grouped)
        np.add(grouped, bias[rows], out=grouped)

    in_pieces(n_rows, n_in, _WEIGHT_PIECE_ITEMS, run)
    return result


def in_pieces(n_rows: int, width: int, piece_items: int, run: Callable[[slice], object]) -> None:
    """Calls run(rows) for successive ranges of rows that contain about `piece_items` numbers each."""
    step = max(1, piece_items // max(width, 1))
    for start in range(0, n_rows, step):
        run(slice(start, min(start + step, n_rows)))


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Splits each byte into two, the low nibble first."""
    spread = codes.astype("<u2")
    spread |= spread << 4
    spread &= 0x0F0F
    return spread.view(np.uint8)
