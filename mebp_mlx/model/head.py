"""Final norm, output matrix and cross-entropy in one pass over the vocabulary.

With a frozen head only dh is needed, and it has the form of attention over the vocabulary:
for chunks W_c of rows keep a running maximum m, sum s and weighted sum acc,

    z = h W_c^T;  m' = max(m, max z);  p = exp(z - m');  s' = s e^(m-m') + sum p;  acc' = acc e^(m-m') + p W_c

and at the end  loss = m + log s - z_y,  dloss/dh = acc / s - W_y.  Two matrix products in
all, each chunk decompressed once, no [N, V] array. The step between the two products is
kernels/online_softmax.py, or ops/cpu.py; ops/cross_entropy.py walks through the chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Step(NamedTuple):
    """What a chunk's logits z [N, C] give: p = exp(z - maximum) in z's dtype; the state after it, and the factor
    e^(m-m') of what was summed up before: float32 [N].
    """

    p: mx.array
    maximum: mx.array
    total: mx.array
    target_logit: mx.array
    shrink: mx.array


class Running(NamedTuple):
    """State of the pass for N rows: maximum, total, target_logit [N], weighted [N, D] or None (loss only); float32."""

    maximum: mx.array
    total: mx.array
    target_logit: mx.array
    weighted: mx.array | None

    @property
    def softmax(self) -> tuple[mx.array, mx.array, mx.array]:
        """What the step between the products takes."""
        return self.maximum, self.total, self.target_logit


def start(n_rows: int, D: int, want_dh: bool) -> Running:
    """The state before any chunk."""
    weighted = mx.zeros((n_rows, D)) if want_dh else None
    return Running(mx.full((n_rows,), float("-inf")), mx.zeros((n_rows,)), mx.zeros((n_rows,)), weighted)


def update(state: Running, step: Step, product: mx.array | None) -> Running:
    """The state after one more chunk; product: p W_c [N, D], or None for the loss only."""
    weighted = None
    if state.weighted is not None:
        assert product is not None
        weighted = state.weighted * step.shrink[:, None] + product.astype(mx.float32)
    return Running(step.maximum, step.total, step.target_logit, weighted)


def losses(state: Running) -> mx.array:
    """The losses [N] after the last chunk."""
    return state.maximum + mx.log(state.total) - state.target_logit


def gradient(state: Running, target_rows: mx.array) -> mx.array:
    """dh [N, D] of the sum of the losses, given each row's target row of the output matrix [N, D]."""
    assert state.weighted is not None
    return state.weighted / state.total[:, None] - target_rows.astype(mx.float32)
