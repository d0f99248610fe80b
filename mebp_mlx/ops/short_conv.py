"""A causal depthwise convolution over the tiles of a sequence, K taps per channel.

    y_t = sum_j w_j x_(t - (K-1) + j);    dx_t = sum_j w_j dy_(t + (K-1) - j)        j = 0 ... K-1, zeros outside

Forward, a tile needs the K - 1 rows before it; backward, the K - 1 rows of dy after it. Sums are float32.
"""

from __future__ import annotations

import mlx.core as mx


def kernel(stored: mx.array) -> mx.array:
    """w [K, channels] of a stored kernel [channels, K, 1] or [channels, 1, K]."""
    return mx.contiguous(stored.reshape(stored.shape[0], -1).T)


def forward(w: mx.array, x: mx.array, before: mx.array) -> mx.array:
    """y [B, T, channels] from x; before [B, K - 1, channels]: the rows of x before it."""
    rows, T = mx.concatenate([before, x], axis=1), x.shape[1]
    return _sum([w[j] * rows[:, j : j + T] for j in range(len(w))]).astype(x.dtype)


def backward(w: mx.array, dy: mx.array, after: mx.array) -> mx.array:
    """dx [B, T, channels] from dy; after [B, K - 1, channels]: the rows of dy after it."""
    rows, T, K = mx.concatenate([dy, after], axis=1), dy.shape[1], len(w)
    return _sum([w[j] * rows[:, K - 1 - j : K - 1 - j + T] for j in range(K)]).astype(dy.dtype)


def last(before: mx.array, x: mx.array) -> mx.array:
    """The rows before the next tile."""
    n = before.shape[1]
    return mx.concatenate([before, x[:, -n:]], axis=1)[:, -n:]


def first(dy: mx.array, after: mx.array) -> mx.array:
    """The rows after the previous tile."""
    n = after.shape[1]
    return mx.concatenate([dy[:, :n], after], axis=1)[:, :n]


def _sum(terms: list[mx.array]) -> mx.array:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
