"""Attention over tiles: a tile's queries in small blocks, against only the keys that the mask lets in.

Exact, about half the work of the full square, and no [H, T, T] array in either direction.
"""

from __future__ import annotations

import mlx.core as mx

from ..model.attention import key_range, split_heads
from ..model.spec import Layer, ModelSpec
from . import scores
from .plan import Plan


class TileAttention:
    """One block's attention, given the projections' outputs k, v as tiles [B, tile, K * head_dim] (emptied)."""

    def __init__(
        self,
        spec: ModelSpec,
        layer: Layer,
        norms: dict[str, mx.array],
        plan: Plan,
        k: list[mx.array],
        v: list[mx.array],
    ):
        self.spec, self.layer, self.norms, self.plan = spec, layer, norms, plan
        self.k = _join(k)  # before norm and rope: its backward starts from here
        self.keys = self._rotated(self.k)
        self.values = split_heads(spec, layer, _join(v), None, 0, rotate=False)
        mx.eval(self.keys, self.values)
        self.d_keys: mx.array | None = None
        self.d_values: mx.array | None = None

    def forward(self, q: mx.array, start: int) -> mx.array:
        """A tile's q [B, tile, H * head_dim], first position `start` -> a [B, tile, H * head_dim]."""
        pieces = []
        for first, last in self._query_blocks(q.shape[1]):
            low, high = key_range(self.layer, start + first, start + last)
            queries = self._queries(q[:, first:last], start + first)
            keys, values = self.keys[:, :, low:high], self.values[:, :, low:high]
            piece = scores.forward(self.spec, self.layer, queries, keys, values, start + first, low)
            mx.eval(piece)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1)

    def backward(self, q: mx.array, da: mx.array, start: int) -> mx.array:
        """dq of a tile from da [B, tile, H * head_dim]; what it adds to dk and dv is kept until finish()."""
        if self.d_keys is None or self.d_values is None:
            self.d_keys, self.d_values = mx.zeros(self.keys.shape), mx.zeros(self.values.shape)  # sums: float32
        pieces = []
        for first, last in self._query_blocks(q.shape[1]):
            low, high = key_range(self.layer, start + first, start + last)

            def turn(part: mx.array, at: int = start + first) -> mx.array:
                return self._queries(part, at)

            part = q[:, first:last]
            queries = turn(part)
            keys, values = self.keys[:, :, low:high], self.values[:, :, low:high]
            d_queries, dk, dv = scores.backward(
                self.spec, self.layer, queries, keys, values, start + first, low, da[:, first:last]
            )
            del queries, keys, values
            (dq,) = mx.vjp(turn, [part], [d_queries])[1]
            self.d_keys[:, :, low:high] += dk
            self.d_values[:, :, low:high] += dv
            mx.eval(dq, self.d_keys, self.d_values)
            pieces.append(dq)
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1)

    def finish(self) -> tuple[mx.array, mx.array]:
        """(dk, dv) [B, T, K * head_dim] of the projections' outputs, after every tile's backward."""
        assert self.d_keys is not None and self.d_values is not None
        dtype = self.k.dtype
        (dk,) = mx.vjp(self._rotated, [self.k], [self.d_keys.astype(dtype)])[1]
        dv = self.d_values.astype(dtype).transpose(0, 2, 1, 3).reshape(self.k.shape)
        mx.eval(dk, dv)
        return dk, dv

    def _queries(self, q: mx.array, start: int) -> mx.array:
        return split_heads(self.spec, self.layer, q, self.norms.get("q_norm"), start)

    def _rotated(self, k: mx.array) -> mx.array:
        return split_heads(self.spec, self.layer, k, self.norms.get("k_norm"), 0)

    def _query_blocks(self, T: int) -> list[tuple[int, int]]:
        step = self.plan.query_block
        return [(first, min(first + step, T)) for first in range(0, T, step)]


def _join(tiles: list[mx.array]) -> mx.array:
    """The whole sequence from its tiles, which are given up."""
    whole = tiles[0] if len(tiles) == 1 else mx.concatenate(tiles, axis=1)
    mx.eval(whole)
    tiles.clear()
    return whole
