"""The decoder block of llama and of most families: they differ in biases, q/k norms, rope and windows alone.

x1 = x + c Wo attention(Wq h, Wk h, Wv h),  h = norm(x);   y = x1 + c mlp(norm(x1))      (families/prenorm.py)
"""

from __future__ import annotations

import mlx.core as mx

from .base import value
from .prenorm import PreNormBlock


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
