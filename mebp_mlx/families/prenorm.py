"""The order of llama's block, whatever mixes the tokens: a subclass has values h -> o, and their backward.

x1 = x + c o(norm(x));   y = x1 + c mlp(norm(x1));   c = 1 but in granite and minicpm
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
        """dL/dh from dL/do, or None; the pairs' gradients on the way."""
        raise NotImplementedError
