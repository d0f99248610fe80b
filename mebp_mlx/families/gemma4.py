"""Gemma 4's decoder block: Gemma 3's with normed values, per-layer inputs in most models, and a final scale.

x1 = x + norm(Wo attention(norm(Wq h), norm(Wk h), unit(Wv h))),  h = norm(x);   x2 = x1 + norm(mlp(norm(x1)))
y = c (x2 + norm(Wpp t)),  t = gelu(Wpg x2) * p;   without per-layer inputs y = c x2
c: layer_scalar;  p: ops/layer_input.py;  scores are not scaled; the rest: families/gemma3.py

Upper layers may share a lower layer's keys and values (engine/shared_keys.py).
"""

from __future__ import annotations

import mlx.core as mx

from ..ops.gated_mlp import GELU_TANH
from .base import value
from .gemma3 import Gemma3Block


class PlainBlock(Gemma3Block):
    """Without per-layer inputs."""

    V = value(lambda b, v: b.unit(v))
    x2 = value(lambda b, x1, d: x1 + b.norm("post_feedforward_layernorm", d))
    y = value(lambda b, x2: b.scaled(x2))

    def scaled(self, x: mx.array) -> mx.array:
        """c x, and its cotangent."""
        return x * self.run.arrays["layer_scalar"].astype(x.dtype)

    def unit(self, v: mx.array) -> mx.array:
        """v / rms(v), head by head."""
        heads = v.reshape(*v.shape[:2], -1, self.run.attention.heads.head_dim)
        return mx.fast.rms_norm(heads, None, self.run.norm_eps).reshape(v.shape)

    def show_keys(self) -> None:
        self.run.attention.append(self.K, self.V)
        self.drop("K", "V")

    def backward(self, dy: mx.array, need_dx: bool) -> mx.array | None:
        below = need_dx or self.trains("q", "k", "v", "o", "gate", "up", "down")
        dx2 = self.input_backward(self.scaled(dy), below)
        del dy
        return None if dx2 is None else super().backward(dx2, need_dx)

    def input_backward(self, dx3: mx.array, need_dx: bool) -> mx.array | None:
        """dL/dx2 from the cotangent of the scaled value, or None."""
        return dx3 if need_dx else None

    def attend_backward(self, da: mx.array) -> dict[str, mx.array]:
        dq = self.query_backward(da)
        dK, dV = self.run.attention.cotangents(self.position, self.shape[1])
        dv = self.evaluated(mx.vjp(self.unit, [self.v], [dV])[1][0])
        self.drop("v")
        return {"q": dq, "k": self.rotate_backward("k", dK), "v": dv}


class Gemma4Block(PlainBlock):
    p = value(lambda b: b.run.layer_input(b.position, b.shape[1]))
    pg = value(lambda b, x2: b.linear("per_layer_input_gate", x2))
    t = value(lambda b, pg, p: GELU_TANH.plain(pg, p))
    pp = value(lambda b, t: b.linear("per_layer_projection", t))
    y = value(lambda b, x2, pp: b.scaled(x2 + b.norm("post_per_layer_input_norm", pp)))

    def input_backward(self, dx3: mx.array, need_dx: bool) -> mx.array | None:
        """dL/dx2 through x2 + norm(Wpp t), or None; p is a constant."""
        dpp = self.norm_backward("post_per_layer_input_norm", self.pp, dx3)
        self.drop("pp")
        dt = self.linear_backward("t", need_dx or self.trains("per_layer_input_gate"), {"per_layer_projection": dpp})
        if dt is None:
            return None
        dpg = self.evaluated(mx.vjp(lambda pg: GELU_TANH.plain(pg, self.p), [self.pg], [dt])[1][0])
        self.drop("p", "pg")
        dx2 = self.linear_backward("x2", need_dx, {"per_layer_input_gate": dpg})
        return None if dx2 is None else self.evaluated(dx3 + dx2)


class PlainSharedBlock(PlainBlock):
    """With another layer's keys and values, without per-layer inputs: k, v, K and V are never read."""

    def show_keys(self) -> None:
        """Does nothing: attention already has them."""

    def attend_backward(self, da: mx.array) -> dict[str, mx.array]:
        return {"q": self.query_backward(da)}


class SharedBlock(PlainSharedBlock, Gemma4Block):
    """With another layer's keys and values."""
