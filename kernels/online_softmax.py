"""One chunk of logits joins a running softmax: the step between the head's two products (online_softmax.metal)."""

from __future__ import annotations

import mlx.core as mx

from mebp_mlx.model.head import Step

from . import trust
from .metal import Source

SOURCE = Source(
    "online_softmax",
    ("z", "maximum", "total", "target_logit", "targets", "first"),
    ("p", "new_maximum", "new_total", "new_target_logit", "shrink"),
)
THREADS = 256


def online_softmax(
    z: mx.array,
    maximum: mx.array,
    total: mx.array,
    target_logit: mx.array,
    targets: mx.array,
    first: int,
    impl: str | None = None,
) -> Step:
    """m' = max(m, max z);  p = e^(z - m');  s' = s e^(m - m') + sum p;  t' = z_y if y is among the columns, else t.

    z [T, C]: logits of the vocabulary from index `first` on, float32, float16 or bfloat16; maximum (-inf at first),
    total, target_logit float32 [T]; targets int32 [T], negative: no label. Not differentiable: the head's gradient
    is written out (model/head.py).
    """
    arguments = (z, maximum, total, target_logit, targets, first)
    found: Step = trust.run("online_softmax", arguments, impl, z.dtype)
    return found


def reference(
    z: mx.array, maximum: mx.array, total: mx.array, target_logit: mx.array, targets: mx.array, first: int
) -> Step:
    """The same in MLX's own operations."""
    wide = z.astype(mx.float32)
    highest = mx.maximum(maximum, wide.max(axis=1))
    shrink = mx.exp(maximum - highest)
    p = mx.exp(wide - highest[:, None])
    return Step(
        p.astype(z.dtype), highest, total * shrink + p.sum(axis=1), pick(wide, target_logit, targets, first), shrink
    )


def pick(z: mx.array, target_logit: mx.array, targets: mx.array, first: int) -> mx.array:
    """z_y [T] where the target is one of the chunk's columns, target_logit elsewhere."""
    column = targets - first
    here = (targets >= 0) & (column >= 0) & (column < z.shape[1])
    found = mx.take_along_axis(z, mx.where(here, column, 0)[:, None], axis=1)[:, 0]
    return mx.where(here, found, target_logit)


def metal(
    z: mx.array, maximum: mx.array, total: mx.array, target_logit: mx.array, targets: mx.array, first: int
) -> Step:
    """The same by the kernel."""
    T, C = z.shape
    found = SOURCE(
        [z, maximum, total, target_logit, targets.astype(mx.int32), mx.array(first, mx.int32)],
        [("scalar", z.dtype), ("THREADS", THREADS)],
        grid=(THREADS, T, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(T, C), (T,), (T,), (T,), (T,)],
        output_dtypes=[z.dtype, *[mx.float32] * 4],
    )
    return Step(*found)


def sample(dtype: mx.Dtype, group_size: int, T: int = 5, C: int = 301, **_: int) -> tuple:
    """Arguments for the first-use check and for timing: a fresh and running states, targets in, before and after the
    chunk, and none.
    """
    z = (4 * mx.random.normal((T, C), key=mx.random.key(7))).astype(dtype)
    rows = mx.arange(T)
    maximum = mx.where(rows == 0, -mx.inf, (3 * rows) % 11 - 2).astype(mx.float32)
    total = mx.where(rows == 0, 0, 1 + rows).astype(mx.float32)
    targets = mx.array([100, 3, 99 + C, 100 + C, -100], mx.int32)[rows % 5]
    return z, maximum, total, rows.astype(mx.float32), targets, 100


trust.register("online_softmax", metal, reference, sample, group_sizes=(0,))
