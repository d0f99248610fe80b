"""The one primitive that is ours: a frozen matrix streamed in row blocks, plus its LoRA pair.

    y = x W^T + b + s (dropout(x) A) B
    dB = s (xA)^T g,  dA = s x^T (g B^T),  dx = g W + s (g B^T) A^T      (x after dropout in the LoRA terms)

xA is never kept: it is r columns, and recomputing it is cheaper than its place. Each row
block is evaluated before the next one is read, so at most one decompressed block exists.
"""

from __future__ import annotations

import mlx.core as mx

from ..model.frozen import Model
from ..model.lora import Pair
from ..model.spec import Linear
from .plan import Plan


def forward(
    model: Model,
    plan: Plan,
    linear: Linear,
    x: mx.array,
    pair: Pair | None,
    scale: float,
    mask: mx.array | None,
) -> mx.array:
    """x [N, in] -> y [N, out]. mask [N, in]: dropout's factor on the LoRA branch, or None."""
    low_rank = None if pair is None else scale * ((x if mask is None else x * mask) @ pair.a)  # [N, r]
    pieces = []
    for start, stop in row_blocks(model, plan, linear):
        y = x @ model.rows(linear, start, stop).T
        bias = model.bias(linear, start, stop)
        if bias is not None:
            y = y + bias
        if low_rank is not None and pair is not None:
            y = y + (low_rank @ pair.b[:, start:stop]).astype(y.dtype)
        mx.eval(y)
        pieces.append(y)
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1)


def input_cotangent(
    model: Model, plan: Plan, linear: Linear, g: mx.array, pair: Pair | None, scale: float, mask: mx.array | None
) -> mx.array:
    """dx [N, in] from g = dL/dy [N, out]; needs no forward value."""
    dx: mx.array | None = None
    for start, stop in row_blocks(model, plan, linear):
        part = g[:, start:stop] @ model.rows(linear, start, stop)
        dx = part if dx is None else dx + part
        mx.eval(dx)
    assert dx is not None
    if pair is not None:
        low_rank = scale * ((g @ pair.b.T) @ pair.a.T)
        dx = dx + (low_rank if mask is None else low_rank * mask).astype(dx.dtype)
    return dx


def pair_gradients(x: mx.array, g: mx.array, pair: Pair, scale: float, mask: mx.array | None) -> Pair:
    """(dA [in, r], dB [r, out]) in float32 from x [N, in] and g = dL/dy [N, out]."""
    x = x.astype(mx.float32) if mask is None else x.astype(mx.float32) * mask
    g = g.astype(mx.float32)
    return Pair(x.T @ (scale * (g @ pair.b.T)), (scale * (x @ pair.a)).T @ g)


def row_blocks(model: Model, plan: Plan, linear: Linear) -> list[tuple[int, int]]:
    """The row ranges [start, stop) in which a matrix is brought in."""
    rows = plan.rows_per_block(linear.in_dims, model.dtype.size)
    return [(start, min(start + rows, linear.out_dims)) for start in range(0, linear.out_dims, rows)]
