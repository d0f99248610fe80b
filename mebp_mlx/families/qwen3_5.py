"""Qwen 3.5's attention block: llama's with an output gate per head (families/llama.py; other layers: gated_delta.py).

[q | s] = Wq h, head by head;   o = Wo (attention(q, Wk h, Wv h) * sigmoid(s))
"""

from __future__ import annotations

import mlx.core as mx

from .base import value
from .llama import LlamaBlock


class Qwen35Block(LlamaBlock):
    not_read = frozenset({"d", "y", "q"})  # q is a part of qg, which is kept

    qg = value(lambda b, h: b.linear("q", h))
    q = value(lambda b, qg: b.part(qg, 0))
    m = value(lambda b, a, qg: a * mx.sigmoid(b.part(qg, 1)))
    o = value(lambda b, m: b.linear("o", m))

    def part(self, qg: mx.array, which: int) -> mx.array:
        """The queries or the gates [B, T, heads * head_dim] from the query projection's output."""
        heads = qg.reshape(*qg.shape[:2], -1, 2, self.run.attention.heads.head_dim)
        return heads[:, :, :, which].reshape(*qg.shape[:2], -1)

    def mixer_backward(self, do: mx.array, need_dx: bool) -> mx.array | None:
        dm = self.linear_backward("m", need_dx or self.trains("q", "k", "v"), {"o": do})
        if dm is None:
            return None
        s = mx.sigmoid(self.part(self.qg, 1))
        ds = self.evaluated(dm * self.a * s * (1 - s))
        g = self.attend_backward(self.evaluated(dm * s))
        head_dim = self.run.attention.heads.head_dim
        parts = [x.reshape(*x.shape[:2], -1, 1, head_dim) for x in (g["q"], ds)]
        g["q"] = self.evaluated(mx.concatenate(parts, axis=3).reshape(*ds.shape[:2], -1))
        self.drop("qg", "q", "a")
        return self.linear_backward("h", need_dx, g)
