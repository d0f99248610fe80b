"""Gemma 3's decoder block: both branches are normed before and after, norm weights are 1 + w (model/base.py).

x1 = x + norm(Wo attention(Wq h, Wk h, Wv h)),  h = norm(x);   y = x1 + norm(mlp(norm(x1)))
"""

from __future__ import annotations

import mlx.core as mx

from ..ops.gated_mlp import GELU_TANH
from .base import Block, value


class Gemma3Block(Block):
    gate = GELU_TANH

    h = value(lambda b, x: b.norm("input_layernorm", x))
    q = value(lambda b, h: b.linear("q", h))
    k = value(lambda b, h: b.linear("k", h))
    v = value(lambda b, h: b.linear("v", h))
    Q = value(lambda b, q: b.rotate("q", q))
    K = value(lambda b, k: b.rotate("k", k))
    a = value(lambda b, Q: b.attend(Q))
    o = value(lambda b, a: b.linear("o", a))
    x1 = value(lambda b, x, o: x + b.norm("post_attention_layernorm", o))
    h2 = value(lambda b, x1: b.norm("pre_feedforward_layernorm", x1))
    d = value(lambda b, h2: b.mlp(h2))
    y = value(lambda b, x1, d: x1 + b.norm("post_feedforward_layernorm", d))

    def backward(self, dy: mx.array, need_dx: bool) -> mx.array | None:
        below_mlp = need_dx or self.trains("q", "k", "v", "o")
        dd = self.norm_backward("post_feedforward_layernorm", self.d, dy)
        self.drop("d")
        dh2 = self.mlp_backward("h2", dd, below_mlp)
        if dh2 is None:
            return None
        dx1 = self.evaluated(dy + self.norm_backward("pre_feedforward_layernorm", self.x1, dh2))
        self.drop("x", "x1")
        del dd, dh2, dy
        do = self.norm_backward("post_attention_layernorm", self.o, dx1)
        self.drop("o")
        da = self.linear_backward("a", need_dx or self.trains("q", "k", "v"), {"o": do})
        del do
        if da is None:
            return None
        dh = self.linear_backward("h", need_dx, self.attend_backward(da))
        del da
        if dh is None:
            return None
        return self.evaluated(dx1 + self.norm_backward("input_layernorm", self.x, dh))
