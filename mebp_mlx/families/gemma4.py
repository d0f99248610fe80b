"""Gemma 4's decoder block: Gemma 3's with norms of values, a gated input of its own, and a scale behind all.

x1 = x + norm(Wo attention(norm(Wq h), norm(Wk h), unit(Wv h))),  h = norm(x);   x2 = x1 + norm(mlp(norm(x1)))
y = c (x2 + norm(Wpp t)),  t = gelu(Wpg x2) * p;   c: layer_scalar;  p: ops/layer_input.py;  scores are not scaled

In the upper layers (Gemma4SharedBlock) keys and values are a lower layer's: engine/shared_keys.py.
"""

from __future__ import annotations

import mlx.core as mx

from ..ops.gated_mlp import GELU_TANH
from .base import Block, value


class Gemma4SharedBlock(Block):
    gate = GELU_TANH

    h = value(lambda b, x: b.norm("input_layernorm", x))
    q = value(lambda b, h: b.linear("q", h))
    Q = value(lambda b, q: b.rotate("q", q))
    a = value(lambda b, Q: b.attend(Q))
    o = value(lambda b, a: b.linear("o", a))
    x1 = value(lambda b, x, o: x + b.norm("post_attention_layernorm", o))
    h2 = value(lambda b, x1: b.norm("pre_feedforward_layernorm", x1))
    d = value(lambda b, h2: b.mlp(h2))
    x2 = value(lambda b, x1, d: x1 + b.norm("post_feedforward_layernorm", d))
    p = value(lambda b: b.run.layer_input(b.position, b.shape[1]))
    pg = value(lambda b, x2: b.linear("per_layer_input_gate", x2))
    t = value(lambda b, pg, p: GELU_TANH.plain(pg, p))
    pp = value(lambda b, t: b.linear("per_layer_projection", t))
    y = value(lambda b, x2, pp: b.scaled(x2 + b.norm("post_per_layer_input_norm", pp)))

    def scaled(self, x: mx.array) -> mx.array:
        """c x, and its cotangent."""
        return x * self.run.arrays["layer_scalar"].astype(x.dtype)

    def show_keys(self) -> None:
        """Attention has those of the other layer."""

    def attend_backward(self, da: mx.array) -> dict[str, mx.array]:
        return {"q": self.query_backward(da)}

    def backward(self, dy: mx.array, need_dx: bool) -> mx.array | None:
        below_mlp = need_dx or self.trains("q", "k", "v", "o")
        dx2 = self.input_backward(self.scaled(dy), below_mlp or self.trains("gate", "up", "down"))
        del dy
        if dx2 is None:
            return None
        dd = self.norm_backward("post_feedforward_layernorm", self.d, dx2)
        self.drop("d")
        dh2 = self.mlp_backward("h2", dd, below_mlp)
        if dh2 is None:
            return None
        dx1 = self.evaluated(dx2 + self.norm_backward("pre_feedforward_layernorm", self.x1, dh2))
        self.drop("x", "x1")
        del dd, dh2, dx2
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

    def input_backward(self, dx3: mx.array, need_dx: bool) -> mx.array | None:
        """dL/dx2 from the cotangent of x2 + norm(Wpp t), or None. p is a constant."""
        dpp = self.norm_backward("post_per_layer_input_norm", self.pp, dx3)
        self.drop("pp")
        dt = self.linear_backward("t", need_dx or self.trains("per_layer_input_gate"), {"per_layer_projection": dpp})
        if dt is None:
            return None
        dpg = self.evaluated(mx.vjp(lambda pg: GELU_TANH.plain(pg, self.p), [self.pg], [dt])[1][0])
        self.drop("p", "pg")
        dx2 = self.linear_backward("x2", need_dx, {"per_layer_input_gate": dpg})
        return None if dx2 is None else self.evaluated(dx3 + dx2)


class Gemma4Block(Gemma4SharedBlock):
    k = value(lambda b, h: b.linear("k", h))
    v = value(lambda b, h: b.linear("v", h))
    K = value(lambda b, k: b.rotate("k", k))
    V = value(lambda b, v: b.unit(v))

    def unit(self, v: mx.array) -> mx.array:
        """v / rms(v), head by head."""
        heads = v.reshape(*v.shape[:2], -1, self.run.attention.heads.head_dim)
        return mx.fast.rms_norm(heads, None, self.run.norm_eps).reshape(v.shape)

    def show_keys(self) -> None:
        self.run.attention.append(self.K, self.V)
        self.drop("K", "V")

    def attend_backward(self, da: mx.array) -> dict[str, mx.array]:
        dq = self.query_backward(da)
        dK, dV = self.run.attention.cotangents(self.position, self.shape[1])
        dv = self.evaluated(mx.vjp(self.unit, [self.v], [dV])[1][0])
        self.drop("v")
        return {"q": dq, "k": self.rotate_backward("k", dK), "v": dv}
