"""Final norm, output matrix and cross-entropy in one pass over the vocabulary.

With a frozen head only dh is needed, and it has the form of attention over the vocabulary:
for chunks W_c of rows keep a running maximum m, sum s and weighted sum acc,

    z = h W_c^T;  m' = max(m, max z);  p = exp(z - m');  s' = s e^(m-m') + sum p;  acc' = acc e^(m-m') + p W_c

and at the end  loss = m + log s - z_y,  dloss/dh = acc / s - W_y.  Two matrix products in
all, each chunk decompressed once, no [N, V] array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx


class Running(NamedTuple):
    """State of the pass for N rows: maximum [N, 1], total [N, 1], weighted [N, D] or None (loss only); float32."""

    maximum: mx.array
    total: mx.array
    weighted: mx.array | None


def start(n_rows: int, D: int, want_dh: bool) -> Running:
    """The state before any chunk."""
    weighted = mx.zeros((n_rows, D)) if want_dh else None
    return Running(mx.full((n_rows, 1), float("-inf")), mx.zeros((n_rows, 1)), weighted)


def exp_minus(z: mx.array, maximum: mx.array) -> tuple[mx.array, mx.array]:
    """(exp(z - maximum) [N, C], its row sums [N, 1])."""
    p = mx.exp(z - maximum)
    return p, p.sum(axis=-1, keepdims=True)


def update(
    state: Running,
    h: mx.array,
    chunk: mx.array,
    exp_minus: Callable[[mx.array, mx.array], tuple[mx.array, mx.array]] = exp_minus,
) -> Running:
    """The state after one more chunk [C, D] of the output matrix; h [N, D] after the final norm.

    exp_minus: the function of that name or a faster one, which may use its first argument's memory for the result.
    """
    z = (h @ chunk.T).astype(mx.float32)
    maximum = mx.maximum(state.maximum, z.max(axis=-1, keepdims=True))
    shrink = mx.exp(state.maximum - maximum)
    p, sums = exp_minus(z, maximum)
    total = state.total * shrink + sums
    weighted = None
    if state.weighted is not None:
        weighted = state.weighted * shrink + (p.astype(h.dtype) @ chunk).astype(mx.float32)
    return Running(maximum, total, weighted)


def finish(state: Running, h: mx.array, target_rows: mx.array) -> tuple[mx.array, mx.array | None]:
    """(losses [N], dh [N, D] of their sum, or None) given each row's target row of the output matrix [N, D]."""
    target_logits = (h.astype(mx.float32) * target_rows.astype(mx.float32)).sum(axis=-1)
    losses = (state.maximum + mx.log(state.total)).squeeze(-1) - target_logits
    dh = None if state.weighted is None else state.weighted / state.total - target_rows.astype(mx.float32)
    return losses, dh
