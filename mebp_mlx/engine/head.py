"""Runs the final norm, output matrix and loss over the labelled rows, a vocabulary chunk at a time."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..kernels import linear_softmax, uses_metal
from ..model import head as one_pass
from ..model.frozen import Model
from ..model.piece import Packed
from .host import online_softmax
from .plan import Plan


class HeadResult(NamedTuple):
    """loss_sum: sum of the labelled tokens' losses; n_labels: how many; n_correct: those that no other token is more
    likely than; dx: tiles of the loss's gradient, or None.
    """

    loss_sum: float
    n_labels: int
    n_correct: int
    dx: list[mx.array] | None


def run(
    model: Model, plan: Plan, x: list[mx.array], targets: np.ndarray, want_dx: bool, weight: float = 1.0
) -> HeadResult:
    """x: tiles [B, tile, D] of the last block's output, emptied; targets int32 [B, T], -100 = no label.

    dx is multiplied by `weight`. Rows without a label are left out of the matrix products.
    """
    spec = model.spec
    starts = np.cumsum([0, *(tile.shape[1] for tile in x)])
    tile_targets = [targets[:, start:stop].reshape(-1) for start, stop in pairwise(starts)]
    labelled = [np.flatnonzero(t != -100) for t in tile_targets]
    y = np.concatenate([t[rows] for t, rows in zip(tile_targets, labelled, strict=True)])
    if len(y) == 0:
        return HeadResult(0.0, 0, 0, [mx.zeros_like(tile) for tile in x] if want_dx else None)
    picked = [_pick(tile, rows) for tile, rows in zip(x, labelled, strict=True)]
    shapes = [tile.shape for tile in x]
    x.clear()
    norm = model.norm(spec.final_norm)
    h = [mx.fast.rms_norm(part, norm, spec.norm_eps) for part in picked]
    joined = h[0] if len(h) == 1 else mx.concatenate(h)
    state = one_pass.start(len(y), spec.D, want_dx)
    chunk = plan.vocabulary_chunk(len(y), spec.D, model.dtype.size)
    mx.eval(joined, state)
    del h
    labels, fused = mx.array(y), not want_dx and _is_fused(model)
    for first in range(0, spec.V, chunk):
        piece = model.piece_of_rows(spec.head, first, min(first + chunk, spec.V))
        if fused:
            assert isinstance(piece, Packed)
            state = linear_softmax(state, joined, *piece.parts, labels, first, piece.packing.group_size)
        else:
            z = piece.forward(joined)
            mx.eval(z)
            step = online_softmax(z, *state.softmax, labels, first)
            del z
            state = one_pass.update(state, step, piece.backward(step.p) if want_dx else None)
            del step
        mx.eval(state)
        del piece  # before the next one is brought in
    loss_sum = float(np.asarray(one_pass.losses(state).sum()))
    n_correct = int(np.asarray((state.target_logit >= state.maximum).sum()))
    if not want_dx:
        return HeadResult(loss_sum, len(y), n_correct, None)
    dh = one_pass.gradient(state, model.gather(spec.head, y))
    dh = (dh * weight).astype(joined.dtype)
    mx.eval(dh)
    del state, joined
    dx, first = [], 0
    for shape, rows in zip(shapes, labelled, strict=True):
        cotangent = dh[first : first + len(rows)]
        first += len(rows)
        part = picked.pop(0)
        if len(rows) == 0:
            dx.append(mx.zeros(shape, dh.dtype))
            continue
        (d_part,) = mx.vjp(lambda v: mx.fast.rms_norm(v, norm, spec.norm_eps), [part], [cotangent])[1]
        n_rows = shape[0] * shape[1]
        if len(rows) < n_rows:
            d_part = mx.zeros((n_rows, spec.D), d_part.dtype).at[mx.array(rows.astype(np.uint32))].add(d_part)
        dx.append(d_part.reshape(shape))
        mx.eval(dx[-1])
    return HeadResult(loss_sum, len(y), n_correct, dx)


def _is_fused(model: Model) -> bool:
    """Whether the loss alone is taken by one kernel, without logits."""
    packing = model.spec.head.quantization
    if packing is None or not model.stays_packed(model.spec.head) or (packing.mode, packing.bits) != ("affine", 4):
        return False
    return bool(uses_metal("linear_cross_entropy", model.dtype, packing.group_size))


def _pick(tile: mx.array, rows: np.ndarray) -> mx.array:
    """The given rows of a tile [B, tile, D] as [n, D]."""
    flat = tile.reshape(-1, tile.shape[-1])
    return flat if len(rows) == flat.shape[0] else flat[mx.array(rows.astype(np.uint32))]
