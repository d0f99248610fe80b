"""exp on the CPU through numpy's vector loops.

MLX's CPU backend takes exp one number at a time (0.35 GB/s where numpy reaches 6), which was a fifth of the head's
time. In float32 on the CPU only; elsewhere the plain MLX function is used.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..model import head
from ..model.unpack import buffer_of, empty, on_cpu

_PIECE_ITEMS = 32 << 10  # stays in a core's cache


def exp_minus(z: mx.array, maximum: mx.array) -> tuple[mx.array, mx.array]:
    """(exp(z - maximum) [N, C] in z's own memory, its row sums [N, 1]); z must belong to the caller alone."""
    if not on_cpu() or z.dtype != mx.float32:
        return head.exp_minus(z, maximum)
    mx.eval(z, maximum)
    values, shift = buffer_of(z), buffer_of(maximum)
    total, sums = empty(len(values), 1)
    step = max(1, _PIECE_ITEMS // values.shape[1])
    with np.errstate(all="ignore"):  # a logit that is no number shows in the loss
        for start in range(0, len(values), step):
            rows = slice(start, start + step)
            piece = values[rows]
            np.subtract(piece, shift[rows], out=piece)
            np.exp(piece, out=piece)
            sums[rows] = piece.sum(axis=-1, keepdims=True)
    return z, total
