"""The final norm, the output matrix and the loss over the labelled rows, a chunk of the vocabulary at a time.

One pass (kernels/online_softmax.py has its algebra): two products a chunk, no [N, V] array. A chunk's graph is
submitted, and the chunk before it waited for, so that two chunks' logits exist at most.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..kernels import cpu, linear_softmax, uses_metal
from ..kernels.online_softmax import SoftmaxState
from ..kernels.online_softmax import online_softmax as softmax_kernel
from ..model import NO_LABEL
from ..model.base import Model, QuantizedBlock
from .plan import Context


class HeadResult(NamedTuple):
    """loss_sum: sum of the labelled tokens' losses; n_labels: how many; n_correct: those whose label is the likeliest
    token; dx: tiles of the loss's gradient, or None.
    """

    loss_sum: float
    n_labels: int
    n_correct: int
    dx: list[mx.array] | None


def cross_entropy(
    context: Context,
    x: list[mx.array],
    targets: np.ndarray,
    need_dx: bool,
    weight: float = 1.0,
    max_chunks: int | None = None,
) -> HeadResult:
    """x: tiles [B, tile, D] of the last block's output, emptied; targets int32 [B, T], NO_LABEL where there is none.

    dx is multiplied by `weight`. Rows without a label are left out of the products. max_chunks: stop early (a probe
    of memory; the loss is that of a part of the vocabulary).
    """
    model, barrier, spec = context.model, context.barrier, context.model.spec
    starts = np.cumsum([0, *(tile.shape[1] for tile in x)])
    tile_targets = [targets[:, start:stop].reshape(-1) for start, stop in pairwise(starts)]
    labelled = [np.flatnonzero(t != NO_LABEL) for t in tile_targets]
    y = np.concatenate([t[rows] for t, rows in zip(tile_targets, labelled, strict=True)])
    if len(y) == 0:
        return HeadResult(0.0, 0, 0, [mx.zeros_like(tile) for tile in x] if need_dx else None)
    picked = [_pick(tile, rows) for tile, rows in zip(x, labelled, strict=True)]
    shapes = [tile.shape for tile in x]
    x.clear()
    normed = final_norm(model)
    h = [normed(part) for part in picked]
    joined = h[0] if len(h) == 1 else mx.concatenate(h)
    del h
    barrier.value(joined, *picked)
    state = scan(context, joined, mx.array(y), need_dx, max_chunks)
    losses = state.losses().sum()
    n_correct = (state.target_logit >= state.maximum).sum()
    barrier.wait(losses, n_correct)
    loss_sum, correct = float(np.asarray(losses)), int(np.asarray(n_correct))
    if not need_dx:
        return HeadResult(loss_sum, len(y), correct, None)
    target_rows = model.gather(spec.head, y)
    if spec.logit_cap is not None:
        target_rows = target_rows * _slope(state.target_logit, spec.logit_cap)[:, None]
    dh = (state.gradient(target_rows) * weight).astype(joined.dtype)
    barrier.value(dh)
    del state, joined
    dx, first = [], 0
    for shape, rows in zip(shapes, labelled, strict=True):
        cotangent = dh[first : first + len(rows)]
        first += len(rows)
        part = picked.pop(0)
        if len(rows) == 0:
            dx.append(mx.zeros(shape, dh.dtype))
            continue
        (d_part,) = mx.vjp(normed, [part], [cotangent])[1]
        n_rows = shape[0] * shape[1]
        if len(rows) < n_rows:
            d_part = mx.zeros((n_rows, spec.D), d_part.dtype).at[mx.array(rows.astype(np.uint32))].add(d_part)
        dx.append(d_part.reshape(shape))
        barrier.value(dx[-1])
    return HeadResult(loss_sum, len(y), correct, dx)


def scan(context: Context, h: mx.array, labels: mx.array, need_dx: bool, max_chunks: int | None = None) -> SoftmaxState:
    """The state after the vocabulary's chunks, from normed rows h [N, D] and labels int32 [N]."""
    model, barrier, spec = context.model, context.barrier, context.model.spec
    state = SoftmaxState.start(h.shape[0], spec.D, need_dx)
    chunk = context.plan.vocabulary_chunk(h.shape[0], model.copied_bytes(spec.head, spec.D), h.dtype.size)
    fused = not need_dx and _is_fused(model)
    for number, first in enumerate(range(0, spec.V, chunk)):
        if number == max_chunks:
            break
        block = model.row_block(spec.head, first, min(first + chunk, spec.V))
        if fused:
            assert isinstance(block, QuantizedBlock)
            state = linear_softmax(state, h, block.parts, labels, first, block.packing.group_size)
        else:
            z = capped(block.matmul(h), spec.logit_cap)
            slope = _slope(z, spec.logit_cap) if need_dx and spec.logit_cap is not None else None
            barrier.piece(*(part for part in (z, slope) if part is not None))
            softmax = cpu.online_softmax if cpu.serves(z) else softmax_kernel
            if slope is not None and cpu.serves(z):
                mx.eval(slope)  # of z itself, whose memory numpy takes for p
            step = softmax(z, *state.softmax, labels, first)
            del z
            dz = step.p if slope is None else step.p * slope
            state = state.update(step, block.matmul_t(dz) if need_dx else None)
            del step, dz, slope
        barrier.chunk(*(part for part in state if part is not None))
        del block  # before the next one is read
    return state


def final_norm(model: Model) -> Callable[[mx.array], mx.array]:
    """The head's input: x / rms(x) * weight / divisor, from the last block's output x."""
    spec, weight = model.spec, model.norm(model.spec.final_norm)

    def normed(x: mx.array) -> mx.array:
        h = mx.fast.rms_norm(x, weight, spec.norm_eps)
        return h if spec.head_divisor == 1 else h / spec.head_divisor

    return normed


def capped(z: mx.array, cap: float | None) -> mx.array:
    """The logits for the loss: cap tanh(z / cap) in families with a cap."""
    return z if cap is None else cap * mx.tanh(z / cap)


def _slope(z: mx.array, cap: float) -> mx.array:
    """dz/dl of capped logits z of l."""
    return 1 - (z / cap) ** 2


def _is_fused(model: Model) -> bool:
    """Whether one kernel computes the loss without logits."""
    packing = model.spec.head.quantization
    if (
        model.spec.logit_cap is not None
        or packing is None
        or not model.stays_packed(model.spec.head)
        or (packing.mode, packing.bits) != ("affine", 4)
    ):
        return False
    return bool(uses_metal("linear_cross_entropy", model.dtype, packing.group_size))


def _pick(tile: mx.array, rows: np.ndarray) -> mx.array:
    """The given rows of a tile [B, tile, D] as [n, D]."""
    flat = tile.reshape(-1, tile.shape[-1])
    return flat if len(rows) == flat.shape[0] else flat[mx.array(rows.astype(np.uint32))]
