"""The decoder block of llama and of most families, which differ only in biases, q/k norms, rope and windows.

x1 = x + c o(norm(x));   y = x1 + c mlp(norm(x1));   c = 1 except in granite and minicpm
o(h) = Wo attention(Wq h, Wk h, Wv h)

PreNormBlock has this order for any token mixer; a subclass adds the values h -> o and their backward.
"""

from __future__ import annotations

from typing import ClassVar

import mlx.core as mx

from ..ops.gated_mlp import SILU
from .base import Block, value


class PreNormBlock(Block):
    gate = SILU
    not_read = frozenset({"d", "y"})
    serves = {"o": "x1"}  # noqa: RUF012
    mixer: ClassVar[tuple[str, ...]]  # projections between h and o

    o: value

    h = value(lambda b, x: b.norm("input_layernorm", x))
    x1 = value(lambda b, x, o: x + b.branch(o))
    h2 = value(lambda b, x1: b.norm("post_attention_layernorm", x1))
    d = value(lambda b, h2: b.mlp(h2))
    y = value(lambda b, x1, d: x1 + b.branch(d))

    def backward(self, dy: mx.array, need_dx: bool) -> mx.array | None:
        dh2 = self.mlp_backward("h2", self.branch(dy), need_dx or self.trains(*self.mixer))
        if dh2 is None:
            return None
        dx1 = self.evaluated(dy + self.norm_backward("post_attention_layernorm", self.x1, dh2))
        self.drop("x", "x1", "o")
        del dh2, dy
        dh = self.mixer_backward(self.branch(dx1), need_dx)
        if dh is None:
            return None
        return self.evaluated(dx1 + self.norm_backward("input_layernorm", self.x, dh))

    def mixer_backward(self, do: mx.array, need_dx: bool) -> mx.array | None:
        """dL/dh from dL/do, or None; accumulates the pairs' gradients."""
        raise NotImplementedError


class LlamaBlock(PreNormBlock):
    mixer = ("q", "k", "v", "o")

    q = value(lambda b, h: b.linear("q", h))
    k = value(lambda b, h: b.linear("k", h))
    v = value(lambda b, h: b.linear("v", h))
    Q = value(lambda b, q: b.rotate("q", q))
    K = value(lambda b, k: b.rotate("k", k))
    a = value(lambda b, Q: b.attend(Q))
    o = value(lambda b, a: b.linear("o", a))

    def mixer_backward(self, do: mx.array, need_dx: bool) -> mx.array | None:
        da = self.linear_backward("a", need_dx or self.trains("q", "k", "v"), {"o": do})
        if da is None:
            return None
        return self.linear_backward("h", need_dx, self.attend_backward(da))
