"""The gated delta rule (Qwen 3.5) in chunks: matrix products, and memory for one chunk and the states between chunks.

One head at one token, with the state S [Dk, Dv]:

    S_t = a_t S_(t-1) + k_t u_t^T,   u_t = b_t (v_t - a_t S_(t-1)^T k_t),   o_t = S_t^T q_t,   a_t = exp(g_t)

In a chunk of C tokens, with D_ij = exp(g_(j+1) + ... + g_i) for i >= j, else 0; c, e, f: from the chunk's start to i,
from j to its end, and over all of it:

    N = strictly lower (D * K K^T),   P = D * Q K^T,   T = (I + b N)^-1
    R = V - c (K S),   U = T (b R),   O = c (Q S) + P U,   S' = f S + (e K)^T U

Sums of g are computed pair by pair, never as differences of running sums: a strong decay would leave its rounding error
in every later pair. T is computed by halves, from products whose entries b bounds. Value head h reads key head h // (Hv
/ Hk). All arrays are float32. Only a chunk's R, U, O and S' depend on the previous chunk.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import mlx.core as mx

from .plan import Barrier
from .silu import exp

CHUNK = 64  # tokens


class Tokens(NamedTuple):
    """q, k [B, T, Hk, Dk], v [B, T, Hv, Dv], g (log of the decay, <= 0) and beta (b) [B, T, Hv]."""

    q: mx.array
    k: mx.array
    v: mx.array
    g: mx.array
    beta: mx.array


class Chunk:
    """The rule on C tokens from state S [B, Hk, Hv / Hk, Dk, Dv]; arrays are [B, Hk, Hv / Hk, C, width]."""

    def __init__(self, tokens: Tokens, S: mx.array):
        n_keys = tokens.q.shape[2]
        self.q, self.k, self.v = (_by_head(x, n_keys) for x in tokens[:3])
        self.g, self.beta = (_by_head(x[..., None], n_keys) for x in tokens[3:])
        self.S = S

    @cached_property
    def decay(self) -> mx.array:
        """[C, 1 + C]: row i, column 1 + j: D_ij; column 0: c_i."""
        C = self.g.shape[-2]
        steps = mx.tril(mx.broadcast_to(self.g, (*self.g.shape[:-1], C + 1)))
        return mx.tril(exp(mx.cumsum(steps, axis=-2)), 1)

    @cached_property
    def into(self) -> mx.array:
        """c [C, 1]."""
        return self.decay[..., :1]

    @cached_property
    def within(self) -> mx.array:
        """D [C, C]."""
        return self.decay[..., 1:]

    @cached_property
    def onto(self) -> mx.array:
        """e [C, 1]."""
        return _t(self.within[..., -1:, :])

    @cached_property
    def through(self) -> mx.array:
        """f [1, 1]."""
        return self.decay[..., -1:, :1]

    @cached_property
    def kk(self) -> mx.array:
        return self.k @ _t(self.k)

    @cached_property
    def qk(self) -> mx.array:
        return self.q @ _t(self.k)

    @cached_property
    def n(self) -> mx.array:
        return mx.tril(self.within * self.kk, -1)

    @cached_property
    def p(self) -> mx.array:
        return self.within * self.qk

    @cached_property
    def t(self) -> mx.array:
        return unit_lower_inverse(self.beta * self.n)

    @cached_property
    def r(self) -> mx.array:
        return self.v - self.into * (self.k @ self.S)

    @cached_property
    def u(self) -> mx.array:
        return self.t @ (self.beta * self.r)

    @property
    def o(self) -> mx.array:
        """O [B, C, Hv, Dv]."""
        return _by_token(self.into * (self.q @ self.S) + self.p @ self.u)

    @property
    def after(self) -> mx.array:
        """S'."""
        return self.through * self.S + _t(self.onto * self.k) @ self.u

    def backward(self, do: mx.array, d_after: mx.array) -> tuple[Tokens, mx.array]:
        """Cotangents of the tokens and S from those of O [B, C, Hv, Dv] and S'.

        Y = T^T (P^T dO + e K dS'),   dV = b Y,   db_i = Y_i . (R - N U)_i
        X = -strictly lower (D * dV U^T),   Z = D * dO U^T      (of K K^T and Q K^T)
        dQ = Z K + c dO S^T,   dK = (X + X^T) K + Z^T Q - c dV S^T + e U dS'^T,   both summed over a key head's values
        dS = f dS' + (c Q)^T dO - (c K)^T dV
        dg_l = sum of D * dD over the pairs i >= l > j
        """
        q, k, S, u = self.q, self.k, self.S, self.u
        do = _by_head(do, q.shape[1])
        y = _t(self.t) @ (_t(self.p) @ do + (self.onto * k) @ d_after)
        dv = self.beta * y
        dbeta = (y * (self.r - self.n @ u)).sum(-1, keepdims=True)
        dqk = self.within * (do @ _t(u))
        dkk = -mx.tril(self.within * (dv @ _t(u)), -1)
        q_S, k_S, k_after = self.into * (do @ _t(S)), -self.into * (dv @ _t(S)), self.onto * (u @ _t(d_after))
        dq = (dqk @ k + q_S).sum(2, keepdims=True)
        dk = ((dkk + _t(dkk)) @ k + _t(dqk) @ q + k_S + k_after).sum(2, keepdims=True)
        dS = self.through * d_after + _t(self.into * q) @ do - _t(self.into * k) @ dv
        from_before = (q * q_S + k * k_S).sum(-1, keepdims=True)
        over_all = (self.through * S * d_after).sum((-1, -2))[..., None]
        to_after = mx.concatenate([over_all, (k * k_after).sum(-1)], axis=-1)
        pairs = mx.concatenate([from_before, dqk * self.qk + dkk * self.kk], axis=-1)
        dg = mx.tril(mx.cumsum(pairs, axis=-2, reverse=True)).sum(-1) + mx.cumsum(to_after, axis=-1)[..., :-1]
        tokens = Tokens(*(_by_token(x) for x in (dq, dk, dv)), *(_by_token(x)[..., 0] for x in (dg[..., None], dbeta)))
        return tokens, dS


def forward(tokens: Tokens, S: mx.array, barrier: Barrier) -> tuple[mx.array, list[mx.array]]:
    """Outputs [B, T, Hv, Dv], and the states before each chunk and after the last one."""
    outputs, states = [], [S]
    for at in _chunks(tokens.v.shape[1]):
        chunk = Chunk(_cut(tokens, at), states[-1])
        outputs.append(chunk.o)
        states.append(chunk.after)
        barrier.piece(outputs[-1], states[-1])
    return mx.concatenate(outputs, axis=1), states


def last_state(tokens: Tokens, S: mx.array, barrier: Barrier) -> mx.array:
    """Only the state after the last token."""
    for at in _chunks(tokens.v.shape[1]):
        S = Chunk(_cut(tokens, at), S).after
        barrier.piece(S)
    return S


def backward(
    tokens: Tokens, states: list[mx.array], do: mx.array, dS: mx.array, barrier: Barrier
) -> tuple[Tokens, mx.array]:
    """Cotangents of the tokens and the first state from those of the outputs and the last state.

    A chunk is recomputed from the state before it (`states`, from forward()).
    """
    parts = []
    for number, at in reversed(list(enumerate(_chunks(tokens.v.shape[1])))):
        part, dS = Chunk(_cut(tokens, at), states[number]).backward(do[:, at], dS)
        parts.append(part)
        barrier.piece(*part, dS)
    return Tokens(*(mx.concatenate(list(pieces[::-1]), axis=1) for pieces in zip(*parts, strict=True))), dS


def first_state(tokens: Tokens) -> mx.array:
    """Zeros: S before the first token."""
    (B, _, n_keys, key_dim), (n_values, value_dim) = tokens.k.shape, tokens.v.shape[2:]
    return mx.zeros((B, n_keys, n_values // n_keys, key_dim, value_dim), tokens.v.dtype)


def unit_lower_inverse(a: mx.array) -> mx.array:
    """(I + a)^-1 of a strictly lower triangular a [..., C, C], by halves: [[T1, 0], [-T2 A21 T1, T2]]."""
    C = a.shape[-1]
    if C == 1:
        return mx.ones_like(a)
    if C & (C - 1):
        pad = (1 << C.bit_length()) - C
        return unit_lower_inverse(mx.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, pad)] * 2))[..., :C, :C]
    half = C // 2
    top, bottom = unit_lower_inverse(mx.stack([a[..., :half, :half], a[..., half:, half:]]))
    corner = -(bottom @ a[..., half:, :half]) @ top
    upper = mx.concatenate([top, mx.zeros_like(top)], axis=-1)
    return mx.concatenate([upper, mx.concatenate([corner, bottom], axis=-1)], axis=-2)


def _chunks(T: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, T)) for start in range(0, T, CHUNK)]


def _cut(tokens: Tokens, at: slice) -> Tokens:
    return Tokens(*(x[:, at] for x in tokens))


def _t(x: mx.array) -> mx.array:
    return x.swapaxes(-1, -2)


def _by_head(x: mx.array, n_keys: int) -> mx.array:
    """[B, C, H, width] -> [B, Hk, H / Hk, C, width]."""
    B, C, H, width = x.shape
    return x.reshape(B, C, n_keys, H // n_keys, width).transpose(0, 2, 3, 1, 4)


def _by_token(x: mx.array) -> mx.array:
    """And back."""
    B, n_keys, per_key, C, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, C, n_keys * per_key, width)
