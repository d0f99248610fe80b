"""Attention of one block over the tiles of a sequence, with rotary embedding and q/k norms.

    Q = rope(norm(q)), K = rope(norm(k)), or norm(rope());  P = softmax(scale Q K^T + mask),  A = P V
    dV = P^T dA,  dP = dA V^T,  dS = scale P (dP - sum(P dP)),  dQ = dS K,  dK = dS^T Q

A tile's queries, in small blocks, are multiplied only by the keys that the mask admits: exact, about half the work of
the full square, and no [H, T, T] array in either direction. Heads that share a key head become rows of one product.
Rows are padded on the right, so causality alone hides padding from every labelled position.

Long rows on Metal use kernels instead (kernels/attention.py): all of a tile's queries at once, no scores in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..kernels import attention as fused
from ..kernels import cpu
from ..model.rope import Rope
from .plan import Barrier


@dataclass(frozen=True)
class Heads:
    """The settings of a layer's attention. window: the number of keys that a query sees; None: all up to its own."""

    head_dim: int
    scale: float
    window: int | None
    rope: Rope | None
    norm_eps: float
    norms: Mapping[str, mx.array | None]  # "q", "k": weights [head_dim], [heads * head_dim] if over a row, or None
    norm_after_rope: bool = False
    cap: float | None = None  # scores are cap * tanh(score / cap)
    sinks: mx.array | None = None  # [heads]: one extra score, without a key, in each head's softmax

    @property
    def is_plain(self) -> bool:
        """Whether numpy's softmax and the kernels support these settings."""
        return self.cap is None and self.sinks is None

    def rotated(self, short: str, x: mx.array, position: int) -> mx.array:
        """q or k [B, T, heads * head_dim] -> Q or K [B, heads, T, head_dim]."""
        if not self.norm_after_rope:
            return self._turned(short, self.split(self._normed(short, x)), position)
        return self._normed(short, self._turned(short, self.split(x), position))

    def rotated_backward(self, short: str, x: mx.array | None, g: mx.array, position: int) -> mx.array:
        """dL/dq [B, T, heads * head_dim] from g = dL/dQ; x: q, needed if there is a norm."""
        if x is not None and self.norm_after_rope:
            g = self._normed_backward(short, self._turned(short, self.split(x), position), g)
        g = self._turned(short, g, position, back=True).transpose(0, 2, 1, 3)
        g = g.reshape(*g.shape[:2], -1)
        return g if x is None or self.norm_after_rope else self._normed_backward(short, x, g)

    def _turned(self, short: str, x: mx.array, position: int, back: bool = False) -> mx.array:
        """The rotary embedding of [B, heads, T, head_dim] from `position` on; back: its transpose, the inverse."""
        rope, n_positions = self.rope, position + x.shape[2]
        if rope is None:
            return x
        if rope.limit is not None and n_positions > rope.limit:
            raise UserError(
                f"--max-seq-length: {n_positions} positions exceed max_position_embeddings={rope.limit}, beyond "
                "which this model's dynamic rope depends on the row's length"
            )
        if rope.magnitude != 1.0:
            factor = mx.where(mx.arange(self.head_dim) < rope.dims, rope.magnitude, 1.0)
            x = x * (rope.magnitude if rope.dims == self.head_dim else factor.astype(x.dtype))
        if rope.growth is not None and short == "q" and n_positions > rope.growth[1]:
            beta, context = rope.growth
            growth = 1 + beta * mx.log(1 + mx.floor(mx.arange(position, n_positions) / context))
            x = x * growth.astype(x.dtype)[:, None]
        base = rope.base if rope.freqs is None else None
        scale = -rope.scale if back else rope.scale
        return mx.fast.rope(
            x, rope.dims, traditional=rope.traditional, base=base, scale=scale, offset=position, freqs=rope.freqs
        )

    def _normed(self, short: str, x: mx.array) -> mx.array:
        norm = self.norms.get(short)
        if norm is None:
            return x
        return mx.fast.rms_norm(x.reshape(*x.shape[:2], -1, norm.size), norm, self.norm_eps).reshape(x.shape)

    def _normed_backward(self, short: str, x: mx.array, g: mx.array) -> mx.array:
        return mx.vjp(lambda x: self._normed(short, x), [x], [g])[1][0]

    def split(self, x: mx.array) -> mx.array:
        """[B, T, heads * head_dim] -> [B, heads, T, head_dim]."""
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(0, 2, 1, 3)

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """The keys [low, high) that the queries [start, stop) may see: causal, and within the window."""
        return (0 if self.window is None else max(0, start - self.window + 1)), stop


class Attention:
    """Keys and values of the tiles so far, and their gradients.

    has_backward: whether a backward pass follows, or this is one.
    """

    def __init__(self, heads: Heads, query_block: int, barrier: Barrier, has_backward: bool = True):
        self.heads, self.query_block, self.barrier = heads, query_block, barrier
        self.has_backward, self.is_fused = has_backward, False
        self.keys: mx.array | None = None  # [B, K, positions so far, head_dim], rotated
        self.values: mx.array | None = None
        self.d_keys: mx.array | None = None  # float32 sums
        self.d_values: mx.array | None = None
        self.sums_keys = True  # False: keys and values are constants
        self.fused: dict[int, tuple[mx.array, mx.array]] = {}  # by position: a kernel's output, and log-sum-exp

    def choose(self, dtype: mx.Dtype, n_positions: int) -> None:
        """Chooses whether rows of that length use the kernels; until it is called, they do not."""
        heads = self.heads
        # Without a backward pass, MLX's own forward is fused for these head dims (but returns no log-sum-exp). MLX
        # differentiates a traced pass, and it cannot differentiate a kernel.
        has_none = not self.has_backward and (heads.head_dim in fused.MLX_FUSED or self.barrier.grain is None)
        n_keys = min(n_positions, heads.window or n_positions)
        self.is_fused = heads.is_plain and not has_none and fused.serves(dtype, heads.head_dim, n_keys)

    def append(self, keys: mx.array, v: mx.array) -> None:
        """The next tile's K [B, K, tile, head_dim] and v [B, tile, K * head_dim]."""
        values = self.heads.split(v)
        if self.keys is not None and self.values is not None:
            keys, values = mx.concatenate([self.keys, keys], axis=2), mx.concatenate([self.values, values], axis=2)
        self.keys, self.values = keys, values
        self.barrier.value(keys, values)

    def __call__(self, Q: mx.array, position: int) -> mx.array:
        """A tile's Q [B, H, tile, head_dim] from a position on -> A [B, tile, H * head_dim]."""
        if self.is_fused:
            return self._fused_forward(Q, position)
        pieces = []
        for start, stop, low, high in self._blocks(Q.shape[2], position):
            queries = Q[:, :, start - position : stop - position]
            pieces.append(forward(self.heads, queries, *self._seen(low, high), start, low))
            self.barrier.piece(pieces[-1])
        return mx.concatenate(pieces, axis=1)

    def backward(self, Q: mx.array, da: mx.array, position: int) -> mx.array:
        """dQ of a tile from da = dL/dA [B, tile, H * head_dim]; its part of dK and dV is accumulated."""
        assert self.keys is not None
        if self.is_fused:
            return self._fused_backward(Q, da, position)
        pieces = []
        for start, stop, low, high in self._blocks(Q.shape[2], position):
            rows = slice(start - position, stop - position)
            dq, dk, dv = backward(self.heads, Q[:, :, rows], *self._seen(low, high), start, low, da[:, rows])
            pieces.append(dq)
            self._add(low, high, dk, dv)
            self.barrier.piece(dq, *self.sums())
        return mx.concatenate(pieces, axis=2)

    def _fused_forward(self, Q: mx.array, position: int) -> mx.array:
        """A of a tile by the kernel; holds A and log-sum-exp for the backward pass."""
        assert self.keys is not None and self.values is not None
        heads = self.heads
        a, lse = fused.attention_forward(Q, self.keys, self.values, heads.scale, position, heads.window)
        a = a.reshape(*a.shape[:2], -1)
        if self.has_backward:
            self.fused[position] = (a, lse)
        self.barrier.piece(a, lse)
        return a

    def _fused_backward(self, Q: mx.array, da: mx.array, position: int) -> mx.array:
        assert self.keys is not None and self.values is not None
        heads, keys, values, shape = self.heads, self.keys, self.values, (*da.shape[:2], -1, self.heads.head_dim)
        if position not in self.fused:
            self._fused_forward(Q, position)
        a, lse = self.fused.pop(position)
        low, high = heads.key_range(position, position + Q.shape[2])
        place, da = (heads.scale, position, heads.window), da.reshape(shape)
        dq, delta = fused.attention_dq(Q, keys, values, (a.reshape(shape), lse), da, place)
        if self.sums_keys:
            self._add(low, high, *fused.attention_dkv(Q, keys, values, da, (lse, delta), (*place, low, high)))
        self.barrier.piece(dq, *self.sums())
        return dq

    def cotangents(self, position: int, T: int) -> tuple[mx.array, mx.array]:
        """(dK [B, K, T, head_dim], dv [B, T, K * head_dim]) of a tile, once it and all later tiles went backward."""
        assert self.keys is not None and self.d_keys is not None and self.d_values is not None
        dk, dv = (d[:, :, position : position + T].astype(self.keys.dtype) for d in (self.d_keys, self.d_values))
        return dk, dv.transpose(0, 2, 1, 3).reshape(dv.shape[0], T, -1)

    def _add(self, low: int, high: int, dk: mx.array, dv: mx.array) -> None:
        assert self.keys is not None
        if not self.sums_keys:
            return
        if self.d_keys is None or self.d_values is None:
            if high - low == self.keys.shape[2]:
                self.d_keys, self.d_values = dk, dv
                return
            self.d_keys, self.d_values = mx.zeros(self.keys.shape), mx.zeros(self.keys.shape)
        elif self.d_keys.dtype != mx.float32:  # a second part
            self.d_keys, self.d_values = self.d_keys.astype(mx.float32), self.d_values.astype(mx.float32)
        self.d_keys[:, :, low:high] += dk
        self.d_values[:, :, low:high] += dv

    def sums(self) -> list[mx.array]:
        """The gradient sums that other tiles' graphs add to."""
        return [] if self.d_keys is None or self.d_values is None else [self.d_keys, self.d_values]

    def _seen(self, low: int, high: int) -> tuple[mx.array, mx.array]:
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, low:high], self.values[:, :, low:high]

    def _blocks(self, T: int, position: int) -> list[tuple[int, int, int, int]]:
        """(query start, stop, key start, stop) of each block of queries."""
        ranges = [(s, min(s + self.query_block, position + T)) for s in range(position, position + T, self.query_block)]
        return [(start, stop, *self.heads.key_range(start, stop)) for start, stop in ranges]


def forward(heads: Heads, q: mx.array, k: mx.array, v: mx.array, start: int, low: int) -> mx.array:
    """A [B, Tq, H * head_dim] of the queries from position `start` on, over the keys from `low` on.

    q [B, H, Tq, head_dim]; k, v [B, K, Tk, head_dim], ending with the last query's own key.
    """
    if not heads.is_plain or not cpu.serves(q, k, v):
        return _merged(_plain(heads, q, k, v, start, low), q.shape)
    p = _probabilities(heads, _grouped(q, k), k, q.shape[2], start, low)
    return _merged(p @ v, q.shape)


def backward(
    heads: Heads, q: mx.array, k: mx.array, v: mx.array, start: int, low: int, da: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """(dq, dk, dv) in the shapes of q, k, v from da [B, Tq, H * head_dim]."""
    B, H, Tq, width = q.shape
    d_out = da.reshape(B, Tq, H, width).transpose(0, 2, 1, 3)
    if not heads.is_plain or not cpu.serves(q, k, v, da):
        dq, dk, dv = mx.vjp(lambda q, k, v: _plain(heads, q, k, v, start, low), [q, k, v], [d_out])[1]
        return dq, dk, dv
    rows, d_out = _grouped(q, k), _grouped(d_out, k)
    p = _probabilities(heads, rows, k, Tq, start, low)
    dv, dp = p.swapaxes(-1, -2) @ d_out, d_out @ v.swapaxes(-1, -2)
    mx.eval(dv, dp)  # numpy works on dp in place
    del d_out
    ds = cpu.softmax_backward(p, dp, heads.scale)
    del p, dp
    dq, dk = (ds @ k).reshape(q.shape), ds.swapaxes(-1, -2) @ rows
    return dq, dk, dv


def _plain(heads: Heads, q: mx.array, k: mx.array, v: mx.array, start: int, low: int) -> mx.array:
    """MLX's own attention, or attention with capped scores: [B, H, Tq, head_dim]."""
    if heads.cap is not None:
        return _capped(heads, q, k, v, start, low)
    mask: mx.array | str = "causal"  # aligned at the end: query i sees the keys up to its own
    if heads.window is not None and start + q.shape[2] > heads.window:
        mask = fused.visible(q.shape[2], k.shape[2], start - low, heads.window)
    sinks = None if heads.sinks is None else heads.sinks.astype(q.dtype)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=heads.scale, mask=mask, sinks=sinks)


def _capped(heads: Heads, q: mx.array, k: mx.array, v: mx.array, start: int, low: int) -> mx.array:
    """Attention with scores t = cap tanh(scale Q K^T / cap), by matrix products: [B, H, Tq, head_dim]."""
    assert heads.cap is not None
    n_queries, n_keys = q.shape[2], k.shape[2]
    scores = heads.cap * mx.tanh((_grouped(q, k) * heads.scale) @ k.swapaxes(-1, -2) / heads.cap)
    by_head = scores.reshape(*scores.shape[:2], -1, n_queries, n_keys)
    seen = mx.where(fused.visible(n_queries, n_keys, start - low, heads.window), by_head, -mx.inf)
    return (mx.softmax(seen, axis=-1, precise=True).reshape(scores.shape) @ v).reshape(q.shape)


def _grouped(q: mx.array, k: mx.array) -> mx.array:
    """[B, H, Tq, head_dim] as [B, K, H / K * Tq, head_dim]."""
    return q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])


def _probabilities(heads: Heads, rows: mx.array, k: mx.array, n_queries: int, start: int, low: int) -> mx.array:
    """P [B, K, H / K * Tq, Tk] of grouped queries."""
    scores = (rows * heads.scale) @ k.swapaxes(-1, -2)
    B, K, n_rows, n_keys = scores.shape
    by_head = scores.reshape(B, K * (n_rows // n_queries), n_queries, n_keys)
    hidden = ~np.asarray(fused.visible(n_queries, n_keys, start - low, heads.window))
    return cpu.softmax(by_head, hidden if hidden.any() else None).reshape(scores.shape)


def _merged(out: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Merges heads, grouped or not, into [B, Tq, H * head_dim]."""
    B, H, Tq, width = shape
    return out.reshape(B, H, Tq, width).transpose(0, 2, 1, 3).reshape(B, Tq, H * width)
