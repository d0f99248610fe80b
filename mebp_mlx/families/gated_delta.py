"""Qwen 3.5's block without attention: a gated delta net (convolution: families/lfm2.py; the rule: ops/gated_delta.py).

c = conv(Wqkv h);   q, k, v = silu(c), q and k of unit length, q / sqrt(Dk);   g = -exp(A_log) softplus(Wa h + dt_bias)
r = rule(q, k, v, g, sigmoid(Wb h));   o = Wout m,   m = norm(r) * silu(Wz h), head by head
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..ops import gated_delta, silu
from ..ops.gated_delta import Tokens
from .base import value
from .lfm2 import ShortConvBlock

_UNIT_EPS = 1e-6  # added to the sum of squares
_APART = 8  # tiles between stored states: one takes as much memory as many tokens (2 MB in the 4B model)


class GatedDeltaBlock(ShortConvBlock):
    mixer = ("qkv", "z", "a", "b", "out")

    qkv = value(lambda b, h: b.linear("qkv", h))
    z = value(lambda b, h: b.linear("z", h))
    alpha = value(lambda b, h: b.linear("a", h))
    beta = value(lambda b, h: b.linear("b", h))
    c = value(lambda b, qkv, before: b.convolved(qkv, before))
    r = value(lambda b, c, alpha, beta: b.rule(c, alpha, beta))
    m = value(lambda b, r, z: b.gated(r, z))
    o = value(lambda b, m: b.linear("out", m))

    states: list[mx.array] | None = None  # in a backward pass: before each chunk of the tile, and after the last

    def tokens(self, c: mx.array, alpha: mx.array, beta: mx.array) -> Tokens:
        """The rule's inputs."""
        return Tokens(*self.heads(silu.silu(_wide(c))), *self.gates(alpha, beta))

    def heads(self, qkv: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """q, k [B, T, Hk, Dk] and v [B, T, Hv, Dv] of silu(c), as the rule takes them."""
        delta = self.run.delta
        assert delta is not None
        width = delta.n_keys * delta.key_dim
        q, k, v = mx.split(qkv, [width, 2 * width], axis=-1)
        q, k = (x.reshape(*x.shape[:2], delta.n_keys, delta.key_dim) for x in (q, k))
        return _unit(q) * delta.key_dim**-0.5, _unit(k), v.reshape(*v.shape[:2], delta.n_values, delta.value_dim)

    def gates(self, alpha: mx.array, beta: mx.array) -> tuple[mx.array, mx.array]:
        """g and b [B, T, Hv]."""
        arrays = self.run.arrays
        g = -mx.exp(arrays["A_log"]) * nn.softplus(_wide(alpha) + arrays["dt_bias"])
        return g, mx.sigmoid(_wide(beta))

    def rule(self, c: mx.array, alpha: mx.array, beta: mx.array) -> mx.array:
        """r [B, T, Hv * Dv]; the state is carried to the next tile."""
        tokens = self.tokens(c, alpha, beta)
        S = self.run.carried.get("S") if self.unread is not None else self.first_state()
        S = gated_delta.first_state(tokens) if S is None else S
        r, states = gated_delta.forward(tokens, S, self.run.barrier)
        if self.unread is not None:
            self.run.carried["S"] = states[-1]
        else:
            self.states = states
        return r.reshape(*r.shape[:2], -1).astype(self.run.dtype)

    def first_state(self) -> mx.array | None:
        """The state before this tile, in a backward pass. Earlier tiles are recomputed from the left: once for every
        _APART-th state, and once more for the states between two of these, on demand.
        """
        tiles: list[GatedDeltaBlock] = self.run.blocks  # type: ignore[assignment]
        index, states = tiles.index(self), self.run.states
        if index and index not in states:
            start = max(states, default=0)
            S = states.get(start)
            for i, tile in enumerate(tiles[start:index], start + 1):
                tokens = tile.tokens(tile.c, tile.alpha, tile.beta)
                S = gated_delta.first_state(tokens) if S is None else S
                S = gated_delta.last_state(tokens, S, self.run.barrier)
                self.run.barrier.value(S)
                if i % _APART == 0 or i > index - index % _APART:
                    states[i] = S
                tile.drop(*tile.names)
        return states.pop(index, None)

    def gated(self, r: mx.array, z: mx.array) -> mx.array:
        """m [B, T, Hv * Dv]."""
        return (self.normed(_wide(r)) * silu.silu(_wide(z))).astype(self.run.dtype)

    def gated_backward(self, dm: mx.array) -> tuple[mx.array, mx.array]:
        """dL/dr and dL/dz."""
        r, z, dm = _wide(self.r), _wide(self.z), _wide(dm)
        (normed,), (dr,) = mx.vjp(self.normed, [r], [dm * silu.silu(z)])
        dz = silu.backward(z, dm * normed)
        return dr.astype(self.run.dtype), dz.astype(self.run.dtype)

    def normed(self, r: mx.array) -> mx.array:
        """norm(r) [B, T, Hv * Dv], head by head."""
        delta = self.run.delta
        assert delta is not None
        by_head = r.reshape(*r.shape[:2], delta.n_values, delta.value_dim)
        return mx.fast.rms_norm(by_head, self.run.arrays["norm"], self.run.norm_eps).reshape(r.shape)

    def mixer_backward(self, do: mx.array, need_dx: bool) -> mx.array | None:
        dm = self.linear_backward("m", need_dx or self.trains("qkv", "z", "a", "b"), {"out": do})
        if dm is None:
            return None
        dr, dz = self.gated_backward(dm)
        self.run.barrier.value(dr, dz)
        self.drop("r", "z")
        dc, dalpha, dbeta = self.rule_backward(dr)
        dqkv = self.evaluated(self.convolved_backward(dc))
        return self.linear_backward("h", need_dx, {"qkv": dqkv, "z": dz, "a": dalpha, "b": dbeta})

    def rule_backward(self, dr: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """dL/dc, dL/dalpha and dL/dbeta."""
        delta, c, gates = self.run.delta, _wide(self.c), [self.alpha, self.beta]
        assert delta is not None
        if self.states is None:  # r was kept
            self.rule(self.c, *gates)
        assert self.states is not None
        qkv = silu.silu(c)
        tokens = Tokens(*self.heads(qkv), *self.gates(*gates))
        dS = self.run.carried.get("dS")
        dS = mx.zeros_like(self.states[-1]) if dS is None else dS
        wide = _wide(dr).reshape(*dr.shape[:2], delta.n_values, delta.value_dim)
        found, self.run.carried["dS"] = gated_delta.backward(tokens, self.states, wide, dS, self.run.barrier)
        self.states = None
        (dqkv,) = mx.vjp(self.heads, [qkv], list(found[:3]))[1]
        dc = silu.backward(c, dqkv).astype(self.run.dtype)
        dalpha, dbeta = mx.vjp(self.gates, gates, list(found[3:]))[1]
        self.run.barrier.value(dc, dalpha, dbeta)
        self.drop("c", "alpha", "beta", "qkv", "before")
        return dc, dalpha, dbeta


def _wide(x: mx.array) -> mx.array:
    return x if x.dtype.size >= 4 else x.astype(mx.float32)


def _unit(x: mx.array) -> mx.array:
    return x * mx.rsqrt((x * x).sum(-1, keepdims=True) + _UNIT_EPS)
