"""Attention as pure functions over one block of queries, so that no [H, T, T] array is ever needed.

Rows are padded on the right, so causality alone keeps padding out of every labelled position.
"""

from __future__ import annotations

import mlx.core as mx

from .spec import Layer, ModelSpec


def split_heads(
    spec: ModelSpec, layer: Layer, x: mx.array, norm_weight: mx.array | None, offset: int, rotate: bool = True
) -> mx.array:
    """A projection's output [B, T, heads * head_dim] as attention wants it: [B, heads, T, head_dim].

    norm_weight [head_dim]: the q/k norm where the family has one; offset: position of the first row.
    """
    x = x.reshape(*x.shape[:2], -1, spec.head_dim)
    if norm_weight is not None:
        x = mx.fast.rms_norm(x, norm_weight, spec.norm_eps)
    x = x.transpose(0, 2, 1, 3)
    return layer.rope(x, offset) if rotate else x


def key_range(layer: Layer, start: int, stop: int) -> tuple[int, int]:
    """Which keys [first, last) the queries [start, stop) may see: causal, and within the window."""
    return (0 if layer.window is None else max(0, start - layer.window + 1)), stop


def attend(spec: ModelSpec, layer: Layer, q: mx.array, k: mx.array, v: mx.array, start: int, first: int) -> mx.array:
    """softmax(scale q k^T + mask) v for the queries from position `start` on the keys from `first` on.

    q [B, H, Tq, head_dim]; k, v [B, K, Tk, head_dim], ending with the last query's own key.
    Returns [B, Tq, H * head_dim].
    """
    mask: mx.array | str = "causal"  # aligned at the end: query i sees the keys up to its own
    if layer.window is not None:
        i = mx.arange(start, start + q.shape[2])[:, None]
        j = mx.arange(first, first + k.shape[2])[None]
        mask = (j <= i) & (j > i - layer.window)
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=spec.attention_scale, mask=mask)
    return out.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)


def attention(
    spec: ModelSpec, layer: Layer, norms: dict[str, mx.array], q: mx.array, k: mx.array, v: mx.array
) -> mx.array:
    """The whole attention at once: projections' outputs [B, T, heads * head_dim] -> [B, T, H * head_dim]."""
    queries = split_heads(spec, layer, q, norms.get("q_norm"), 0)
    keys = split_heads(spec, layer, k, norms.get("k_norm"), 0)
    return attend(spec, layer, queries, keys, split_heads(spec, layer, v, None, 0, rotate=False), 0, 0)
