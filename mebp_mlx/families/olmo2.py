"""The decoder block of OLMo 2, OLMo 3 and EXAONE 4: norms only follow the branches (families/base.py).

x1 = x + norm(Wo attention(Wq x, Wk x, Wv x));   y = x1 + norm(mlp(x1))
"""

from __future__ import annotations

import mlx.core as mx

from ..ops.gated_mlp import SILU
from .base import Block, value


class Olmo2Block(Block):
    gate = SILU

    q = value(lambda b, x: b.linear("q", x))
    k = value(lambda b, x: b.linear("k", x))
    v = value(lambda b, x: b.linear("v", x))
    Q = value(lambda b, q: b.rotate("q", q))
    K = value(lambda b, k: b.rotate("k", k))
    a = value(lambda b, Q: b.attend(Q))
    o = value(lambda b, a: b.linear("o", a))
    x1 = value(lambda b, x, o: x + b.norm("post_attention_layernorm", o))
    d = value(lambda b, x1: b.mlp(x1))
    y = value(lambda b, x1, d: x1 + b.norm("post_feedforward_layernorm", d))

    def backward(self, dy: mx.array, need_dx: bool) -> mx.array | None:
        below_mlp = need_dx or self.trains("q", "k", "v", "o")
        dd = self.norm_backward("post_feedforward_layernorm", self.d, dy)
        self.drop("d")
        dm = self.mlp_backward("x1", dd, below_mlp)
        if dm is None:
            return None
        dx1 = self.evaluated(dy + dm)
        self.drop("x", "x1")
        del dd, dm, dy
        do = self.norm_backward("post_attention_layernorm", self.o, dx1)
        self.drop("o")
        da = self.linear_backward("a", need_dx or self.trains("q", "k", "v"), {"o": do})
        del do
        if da is None:
            return None
        dx = self.linear_backward("x", need_dx, self.attend_backward(da))
        return None if dx is None else self.evaluated(dx1 + dx)
