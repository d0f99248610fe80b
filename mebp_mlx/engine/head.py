"""Runs the final norm, output matrix and loss over the labelled rows, a vocabulary chunk at a time."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..model import head as one_pass
from ..model.frozen import Model
from .plan import Plan


class HeadResult(NamedTuple):
    """loss_sum: sum of the labelled tokens' losses; n_labels: how many; dx: gradient of loss_sum [B, T, D] or None."""

    loss_sum: float
    n_labels: int
    dx: mx.array | None


def run(model: Model, plan: Plan, x: mx.array, targets: np.ndarray, want_dx: bool, weight: float = 1.0) -> HeadResult:
    """x [B, T, D]: the last block's output; targets int32 [B, T], -100 = no label; dx is multiplied by `weight`.

    Rows without a label are left out of the matrix products.
    """
    spec = model.spec
    labelled = np.flatnonzero(targets.reshape(-1) != -100)
    n_labels = len(labelled)
    if n_labels == 0:
        return HeadResult(0.0, 0, mx.zeros_like(x) if want_dx else None)
    every_row = n_labels == targets.size
    rows = mx.array(labelled.astype(np.uint32))
    flat = x.reshape(-1, spec.D)
    picked = flat if every_row else flat[rows]
    norm = model.norm(spec.final_norm)
    h = mx.fast.rms_norm(picked, norm, spec.norm_eps)
    state = one_pass.start(n_labels, spec.D, want_dx)
    chunk = plan.vocabulary_chunk(spec.D, model.dtype.size)
    mx.eval(h, state)
    for first in range(0, spec.V, chunk):
        state = one_pass.update(state, h, model.rows(spec.head, first, min(first + chunk, spec.V)))
        mx.eval(state)
    target_rows = model.gather(spec.head, targets.reshape(-1)[labelled])
    losses, dh = one_pass.finish(state, h, target_rows)
    loss_sum = float(np.asarray(losses.sum()))
    if dh is None:
        return HeadResult(loss_sum, n_labels, None)
    cotangent = (dh * weight).astype(h.dtype)
    (d_picked,) = mx.vjp(lambda v: mx.fast.rms_norm(v, norm, spec.norm_eps), [picked], [cotangent])[1]
    dx = d_picked if every_row else mx.zeros_like(flat).at[rows].add(d_picked)
    dx = dx.reshape(x.shape)
    mx.eval(dx)
    return HeadResult(loss_sum, n_labels, dx)
