"""The output matrix and the cross-entropy in one pass over the vocabulary (online_softmax.metal computes its step).

With a frozen head only dh is needed, and it has the form of attention over the vocabulary. For each chunk W_c of rows,
update a running maximum m, sum s and weighted sum acc,

    z = h W_c^T;  m' = max(m, max z);  p = exp(z - m');  s' = s e^(m-m') + sum p;  acc' = acc e^(m-m') + p W_c

and at the end  loss = m + log s - z_y,  dloss/dh = acc / s - W_y.  This takes two matrix products per chunk,
dequantizes each chunk once, and needs no [N, V] array. `online_softmax` is the step between the two products, computed
by the kernel, by MLX's own operations or by numpy (cpu.py); ops/cross_entropy.py loops over the chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from . import selfcheck
from .metal import Source

SOURCE = Source(
    "online_softmax",
    ("z", "maximum", "total", "target_logit", "targets", "first"),
    ("p", "new_maximum", "new_total", "new_target_logit", "shrink"),
)
THREADS = 256


class SoftmaxStep(NamedTuple):
    """The results for a chunk's logits z [N, C]: p = exp(z - maximum) in z's dtype; the new maximum, total and
    target_logit; and shrink, the factor e^(m-m') that rescales the old sums: float32 [N].
    """

    p: mx.array
    maximum: mx.array
    total: mx.array
    target_logit: mx.array
    shrink: mx.array


class SoftmaxState(NamedTuple):
    """The state for N rows: maximum, total, target_logit [N]; weighted [N, D] or None (loss only); all float32."""

    maximum: mx.array
    total: mx.array
    target_logit: mx.array
    weighted: mx.array | None

    @property
    def softmax(self) -> tuple[mx.array, mx.array, mx.array]:
        """The arguments for the step between the products."""
        return self.maximum, self.total, self.target_logit

    @classmethod
    def start(cls, n_rows: int, D: int, need_dh: bool) -> SoftmaxState:
        """The state before the first chunk."""
        weighted = mx.zeros((n_rows, D)) if need_dh else None
        return cls(mx.full((n_rows,), float("-inf")), mx.zeros((n_rows,)), mx.zeros((n_rows,)), weighted)

    def update(self, step: SoftmaxStep, product: mx.array | None) -> SoftmaxState:
        """The state after one more chunk. product: p W_c [N, D], or None for the loss only."""
        weighted = None
        if self.weighted is not None:
            assert product is not None
            weighted = self.weighted * step.shrink[:, None] + product.astype(mx.float32)
        return SoftmaxState(step.maximum, step.total, step.target_logit, weighted)

    def losses(self) -> mx.array:
        """The losses [N] after the last chunk."""
        return self.maximum + mx.log(self.total) - self.target_logit

    def gradient(self, target_rows: mx.array) -> mx.array:
        """dh [N, D] of the sum of the losses, given each row's target row of the output matrix [N, D]."""
        assert self.weighted is not None
        return self.weighted / self.total[:, None] - target_rows.astype(mx.float32)


def online_softmax(
    z: mx.array,
    maximum: mx.array,
    total: mx.array,
    target_logit: mx.array,
    targets: mx.array,
    first: int,
    impl: str | None = None,
) -> SoftmaxStep:
    """m' = max(m, max z);  p = e^(z - m');  s' = s e^(m - m') + sum p;  t' = z_y if y is one of the columns, else t.

    z [T, C]: logits of the vocabulary from index `first` on, float32, float16 or bfloat16; maximum (-inf at first),
    total, target_logit float32 [T]; targets int32 [T], negative: no label. Not differentiable: the head's gradient
    is SoftmaxState.gradient.
    """
    arguments = (z, maximum, total, target_logit, targets, first)
    step: SoftmaxStep = selfcheck.run("online_softmax", arguments, impl, z.dtype)
    return step


def reference(
    z: mx.array, maximum: mx.array, total: mx.array, target_logit: mx.array, targets: mx.array, first: int
) -> SoftmaxStep:
    """`online_softmax` in MLX's own operations."""
    wide = z.astype(mx.float32)
    highest = mx.maximum(maximum, wide.max(axis=1))
    shrink = mx.exp(maximum - highest)
    p = mx.exp(wide - highest[:, None])
    return SoftmaxStep(
        p.astype(z.dtype), highest, total * shrink + p.sum(axis=1), pick(wide, target_logit, targets, first), shrink
    )


def pick(z: mx.array, target_logit: mx.array, targets: mx.array, first: int) -> mx.array:
    """z_y [T] if the target is one of the chunk's columns, otherwise target_logit."""
    column = targets - first
    here = (targets >= 0) & (column >= 0) & (column < z.shape[1])
    logits = mx.take_along_axis(z, mx.where(here, column, 0)[:, None], axis=1)[:, 0]
    return mx.where(here, logits, target_logit)


def metal(
    z: mx.array, maximum: mx.array, total: mx.array, target_logit: mx.array, targets: mx.array, first: int
) -> SoftmaxStep:
    """`online_softmax` by the Metal kernel."""
    T, C = z.shape
    outputs = SOURCE(
        [z, maximum, total, target_logit, targets.astype(mx.int32), mx.array(first, mx.int32)],
        [("scalar", z.dtype), ("THREADS", THREADS)],
        grid=(THREADS, T, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(T, C), (T,), (T,), (T,), (T,)],
        output_dtypes=[z.dtype, *[mx.float32] * 4],
    )
    return SoftmaxStep(*outputs)


def sample(dtype: mx.Dtype, group_size: int, T: int = 5, C: int = 301, **_: int) -> tuple:
    """Arguments for the first-use check and for timing: a fresh state and running ones; targets in, before and after
    the chunk, and no target.
    """
    z = (4 * mx.random.normal((T, C), key=mx.random.key(7))).astype(dtype)
    rows = mx.arange(T)
    maximum = mx.where(rows == 0, -mx.inf, (3 * rows) % 11 - 2).astype(mx.float32)
    total = mx.where(rows == 0, 0, 1 + rows).astype(mx.float32)
    targets = mx.array([100, 3, 99 + C, 100 + C, -100], mx.int32)[rows % 5]
    return z, maximum, total, rows.astype(mx.float32), targets, 100


selfcheck.register("online_softmax", metal, reference, sample, group_sizes=(0,))
