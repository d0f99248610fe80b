"""One block of queries against its keys, forward and backward, with the softmax in place on the CPU (host.py).

    P = softmax(scale Q K^T + mask),  A = P V
    dV = P^T dA,  dP = dA V^T,  dS = scale P (dP - sum(P dP)),  dQ = dS K,  dK = dS^T Q
Heads that share a key head are rows of one product. Elsewhere than on the float32 CPU: MLX's own attention and vjp.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..model.attention import attend
from ..model.spec import Layer, ModelSpec
from . import host


def forward(spec: ModelSpec, layer: Layer, q: mx.array, k: mx.array, v: mx.array, start: int, first: int) -> mx.array:
    """As model.attention.attend: q [B, H, Tq, head_dim], k, v [B, K, Tk, head_dim] -> [B, Tq, H * head_dim]."""
    if not host.usable(q, k, v):
        return attend(spec, layer, q, k, v, start, first)
    p = _probabilities(spec, layer, _grouped(q, k), k, q.shape[2], start, first)
    return _merged(p @ v, q.shape)


def backward(
    spec: ModelSpec, layer: Layer, q: mx.array, k: mx.array, v: mx.array, start: int, first: int, da: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """(dq, dk, dv) in the shapes of q, k, v from da [B, Tq, H * head_dim], not evaluated."""
    if not host.usable(q, k, v, da):

        def run(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return attend(spec, layer, q, k, v, start, first)

        dq, dk, dv = mx.vjp(run, [q, k, v], [da])[1]
        return dq, dk, dv
    B, H, Tq, width = q.shape
    rows = _grouped(q, k)
    p = _probabilities(spec, layer, rows, k, Tq, start, first)
    d_out = _grouped(da.reshape(B, Tq, H, width).transpose(0, 2, 1, 3), k)
    dv = p.swapaxes(-1, -2) @ d_out
    dp = d_out @ v.swapaxes(-1, -2)
    mx.eval(dv, dp)
    del d_out
    ds = host.softmax_backward(p, dp, spec.attention_scale)
    del p, dp
    dq, dk = (ds @ k).reshape(q.shape), ds.swapaxes(-1, -2) @ rows
    mx.eval(dq, dk)
    return dq, dk, dv


def _grouped(q: mx.array, k: mx.array) -> mx.array:
    """[B, H, Tq, head_dim] as [B, K, H / K * Tq, head_dim]."""
    return q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])


def _probabilities(
    spec: ModelSpec, layer: Layer, rows: mx.array, k: mx.array, n_queries: int, start: int, first: int
) -> mx.array:
    """P [B, K, H / K * Tq, Tk] of grouped queries."""
    scores = (rows * spec.attention_scale) @ k.swapaxes(-1, -2)
    B, K, n_rows, n_keys = scores.shape
    by_head = scores.reshape(B, K * (n_rows // n_queries), n_queries, n_keys)
    return host.softmax(by_head, _hidden(layer, n_queries, n_keys, start, first)).reshape(scores.shape)


def _hidden(layer: Layer, n_queries: int, n_keys: int, start: int, first: int) -> np.ndarray | None:
    """Which keys from `first` on each query from `start` on must not see; None: all are seen."""
    i, j = np.arange(start, start + n_queries)[:, None], np.arange(first, first + n_keys)[None]
    hidden = j > i
    if layer.window is not None:
        hidden |= j <= i - layer.window
    return hidden if hidden.any() else None


def _merged(heads: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Grouped heads back as [B, Tq, H * head_dim]."""
    B, H, Tq, width = shape
    return heads.reshape(B, H, Tq, width).transpose(0, 2, 1, 3).reshape(B, Tq, H * width)
