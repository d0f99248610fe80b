"""The final norm, the output matrix and the loss over the labelled rows, a chunk of the vocabulary at a time.

One pass (algebra: kernels/online_softmax.py): two products per chunk, no [N, V] array. After submitting a chunk's
graph, the pass waits for the previous chunk, so at most two chunks' logits exist.
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

# Labelled rows processed together: every chunk streams two [rows, D] arrays through memory (the running sum and its
# product), and with more rows, a chunk of the same size has fewer columns.
ROWS = 4096


class HeadResult(NamedTuple):
    """loss_sum: sum of the labelled tokens' losses; n_labels: how many; n_correct: those whose label is the most likely
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
    """x: tiles [B, tile, D] of the last block's output, emptied; targets int32 [B, T], NO_LABEL for tokens without a
    label.

    dx is multiplied by `weight`. Rows without a label are excluded from the products. max_chunks: stop early (for
    memory probes; the loss then covers only part of the vocabulary).
    """
    starts = np.cumsum([0, *(tile.shape[1] for tile in x)])
    tile_targets = [targets[:, start:stop].reshape(-1) for start, stop in pairwise(starts)]
    labelled = [np.flatnonzero(t != NO_LABEL) for t in tile_targets]
    n_labels = sum(map(len, labelled))
    if n_labels == 0:
        return HeadResult(0.0, 0, 0, [mx.zeros_like(tile) for tile in x] if need_dx else None)
    normed, dx = final_norm(context.model), []
    losses, correct = [], []
    for n_tiles in _groups([len(rows) for rows in labelled]):
        tiles = [x.pop(0) for _ in range(n_tiles)]
        shapes = [tile.shape for tile in tiles]
        rows, y = labelled[:n_tiles], [t[r] for t, r in zip(tile_targets, labelled[:n_tiles], strict=False)]
        del labelled[:n_tiles], tile_targets[:n_tiles]
        picked = [_pick(tile, r) for tile, r in zip(tiles, rows, strict=True)]
        del tiles
        state, dh = _rows(context, normed, picked, np.concatenate(y), need_dx, weight, max_chunks)
        losses.append(state.losses().sum())
        correct.append((state.target_logit >= state.maximum).sum())
        context.barrier.value(losses[-1], correct[-1])
        del state
        if dh is not None:
            dx += _tiles_of(context, normed, picked, dh, rows, shapes)
            if x:  # otherwise a lazy graph would hold every group's sums until the backward pass
                context.barrier.chunk(*dx[-n_tiles:])
    context.barrier.wait(*losses, *correct)
    loss_sum = float(sum(float(np.asarray(loss)) for loss in losses))
    return HeadResult(loss_sum, n_labels, sum(int(np.asarray(n)) for n in correct), dx if need_dx else None)


def _groups(n_rows: list[int]) -> list[int]:
    """Numbers of consecutive tiles to process together, at most ROWS labelled rows each; n_rows: of each tile."""
    groups, rows = [0], 0
    for n in n_rows:
        if groups[-1] and rows + n > ROWS:
            groups.append(0)
            rows = 0
        groups[-1] += 1
        rows += n
    return groups


def _rows(
    context: Context,
    normed: Callable[[mx.array], mx.array],
    picked: list[mx.array],
    y: np.ndarray,
    need_dx: bool,
    weight: float,
    max_chunks: int | None,
) -> tuple[SoftmaxState, mx.array | None]:
    """The state after the vocabulary, without its weighted sum, and weight * dL/dh [N, D] or None."""
    model, barrier, spec = context.model, context.barrier, context.model.spec
    h = [normed(part) for part in picked]
    joined = h[0] if len(h) == 1 else mx.concatenate(h)
    del h
    barrier.value(joined, *picked)
    if len(y) == 0:
        return SoftmaxState.start(0, spec.D, False), joined if need_dx else None
    state = scan(context, joined, mx.array(y), need_dx, max_chunks)
    if not need_dx:
        return state, None
    target_rows = model.gather(spec.head, y)
    if spec.logit_cap is not None:
        target_rows = target_rows * _slope(state.target_logit, spec.logit_cap)[:, None]
    dh = (state.gradient(target_rows) * weight).astype(joined.dtype)
    barrier.value(dh)
    return state._replace(weighted=None), dh


def _tiles_of(
    context: Context,
    normed: Callable[[mx.array], mx.array],
    picked: list[mx.array],
    dh: mx.array,
    labelled: list[np.ndarray],
    shapes: list[tuple[int, ...]],
) -> list[mx.array]:
    """Tiles of dL/dx from dL/dh of their labelled rows; `picked`, those rows of x, is emptied."""
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
            d_part = mx.zeros((n_rows, shape[2]), d_part.dtype).at[mx.array(rows.astype(np.uint32))].add(d_part)
        dx.append(d_part.reshape(shape))
        context.barrier.value(dx[-1])
    return dx


def scan(context: Context, h: mx.array, labels: mx.array, need_dx: bool, max_chunks: int | None = None) -> SoftmaxState:
    """The state after the vocabulary's chunks, from normed rows h [N, D] and labels int32 [N]."""
    model, barrier, spec = context.model, context.barrier, context.model.spec
    state = SoftmaxState.start(h.shape[0], spec.D, need_dx)
    fused = not need_dx and not barrier.is_lazy and _is_fused(model)
    logit_bytes = 0 if fused else h.dtype.size
    chunk = context.plan.vocabulary_chunk(h.shape[0], model.copied_bytes(spec.head, spec.D), logit_bytes)
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
                mx.eval(z, slope)  # numpy reuses z's memory, so the slope must be computed first
            step = softmax(z, *state.softmax, labels, first)
            del z
            dz = step.p if slope is None else step.p * slope
            state = state.update(step, block.matmul_t(dz) if need_dx else None)
            del step, dz, slope
        barrier.chunk(*(part for part in state if part is not None))
        del block  # before reading the next one
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
    """dz/dl for capped logits z = cap tanh(l / cap)."""
    return 1 - (z / cap) ** 2


def _is_fused(model: Model) -> bool:
    """Whether one kernel can compute the loss without logits.

    Its own products are slower than MLX's (bench.head_forward): it is used only in grains that wait for every chunk's
    logits.
    """
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
