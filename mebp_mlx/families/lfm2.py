"""LFM2's short convolution block; its layers with attention are llama's blocks (families/llama.py).

[b | c | z] = Win h;   o = Wout m,   m = c * conv(b * z)                                   conv: ops/short_conv.py
"""

from __future__ import annotations

import mlx.core as mx

from ..ops import short_conv
from .base import value
from .llama import PreNormBlock


class Lfm2Block(PreNormBlock):
    mixer = ("in", "out")
    always = frozenset({"x", "before"})

    bcx = value(lambda b, h: b.linear("in", h))
    before = value(lambda b: b.carried("u"))  # the last rows of the tile before
    m = value(lambda b, bcx, before: b.convolved(bcx, before))
    o = value(lambda b, m: b.linear("out", m))

    @property
    def w(self) -> mx.array:
        """The convolution's kernel [K, D]."""
        return short_conv.kernel(self.run.arrays["conv"])

    def carried(self, name: str) -> mx.array:
        """K - 1 rows of the neighbouring tile, zeros where there is none."""
        K, D = self.w.shape
        rows = self.run.carried.get(name)
        return mx.zeros((self.shape[0], K - 1, D), self.run.dtype) if rows is None else rows

    def convolved(self, bcx: mx.array, before: mx.array) -> mx.array:
        """c * conv(b * z)."""
        b, c, z = mx.split(bcx, 3, axis=-1)
        u = b * z
        if self.unread is not None:
            self.run.carried["u"] = short_conv.last(before, u)
        return c * short_conv.forward(self.w, u, before)

    def mixer_backward(self, do: mx.array, need_dx: bool) -> mx.array | None:
        dm = self.linear_backward("m", need_dx or self.trains("in"), {"out": do})
        if dm is None:
            return None
        b, c, z = mx.split(self.bcx, 3, axis=-1)
        dc = dm * short_conv.forward(self.w, b * z, self.before)
        dconv, after = dm * c, self.carried("dconv")
        du = short_conv.backward(self.w, dconv, after)
        self.run.carried["dconv"] = short_conv.first(dconv, after)
        self.drop("bcx", "before")
        dbcx = self.evaluated(mx.concatenate([du * z, dc, du * b], axis=-1))
        return self.linear_backward("h", need_dx, {"in": dbcx})
