"""LFM2's short convolution block; its layers with attention are llama's blocks (families/llama.py).

[b | c | z] = Win h;   o = Wout m,   m = c * conv(b * z)                                   conv: ops/short_conv.py

ShortConvBlock is the base of every block with such a convolution.
"""

from __future__ import annotations

import mlx.core as mx

from ..ops import short_conv
from .base import value
from .llama import PreNormBlock


class ShortConvBlock(PreNormBlock):
    always = frozenset({"x", "before"})

    before = value(lambda b: b.neighbour("u"))  # the last rows of the convolution's input in the tile before

    @property
    def w(self) -> mx.array:
        """The convolution's kernel [K, channels]."""
        return short_conv.kernel(self.run.arrays["conv"])

    def neighbour(self, name: str) -> mx.array:
        """K - 1 rows of the neighbouring tile; zeros if there is none."""
        K, channels = self.w.shape
        rows = self.run.carried.get(name)
        return mx.zeros((self.shape[0], K - 1, channels), self.run.dtype) if rows is None else rows

    def convolved(self, u: mx.array, before: mx.array) -> mx.array:
        """conv(u); carries the last rows to the next tile."""
        if self.unread is not None:
            self.run.carried["u"] = short_conv.last(before, u)
        return short_conv.forward(self.w, u, before)

    def convolved_backward(self, g: mx.array) -> mx.array:
        """dL/du from g = dL/d conv(u); carries the first rows to the previous tile."""
        after = self.neighbour("dconv")
        self.run.carried["dconv"] = short_conv.first(g, after)
        return short_conv.backward(self.w, g, after)


class Lfm2Block(ShortConvBlock):
    mixer = ("in", "out")

    bcx = value(lambda b, h: b.linear("in", h))
    m = value(lambda b, bcx, before: b.mixed(bcx, before))
    o = value(lambda b, m: b.linear("out", m))

    def mixed(self, bcx: mx.array, before: mx.array) -> mx.array:
        """c * conv(b * z)."""
        b, c, z = mx.split(bcx, 3, axis=-1)
        return c * self.convolved(b * z, before)

    def mixer_backward(self, do: mx.array, need_dx: bool) -> mx.array | None:
        dm = self.linear_backward("m", need_dx or self.trains("in"), {"out": do})
        if dm is None:
            return None
        b, c, z = mx.split(self.bcx, 3, axis=-1)
        dc = dm * short_conv.forward(self.w, b * z, self.before)
        du = self.convolved_backward(dm * c)
        self.drop("bcx", "before")
        dbcx = self.evaluated(mx.concatenate([du * z, dc, du * b], axis=-1))
        return self.linear_backward("h", need_dx, {"in": dbcx})
