"""The one primitive that is ours: a frozen matrix streamed in blocks, plus its LoRA pair.

    y = x W^T + b + s (dropout(x) A) B
    dB = s (xA)^T g,  dA = s x^T (g B^T),  dx = g W + s (g B^T) A^T      (x after dropout in the LoRA terms)

xA is never kept: it is r columns, and recomputing it is cheaper than its place. RowStream takes
the matrix by rows, which are columns of y; ColumnStream by columns, which are columns of x. Both
evaluate a block before the next one is read, so at most one decompressed block exists.
"""

from __future__ import annotations

import mlx.core as mx

from ..model.frozen import Model
from ..model.lora import Pair
from ..model.spec import Linear
from .plan import Plan


class RowStream:
    """A projection of a whole x [N, in], its output made, or its cotangent taken, in ranges of columns.

    mask [N, in]: dropout's factor on the LoRA branch, or None. x may be None for a backward without a pair.
    """

    def __init__(
        self, model: Model, linear: Linear, x: mx.array | None, pair: Pair | None, scale: float, mask: mx.array | None
    ):
        self.model, self.linear, self.pair, self.scale, self.mask = model, linear, pair, scale, mask
        self.x = x
        self.low_rank: mx.array | None = None  # s (dropout(x) A) [N, r]
        if pair is not None:
            self.low_rank = scale * (self._dropped() @ pair.a)
            mx.eval(self.low_rank)
        self.dx: mx.array | None = None
        self._g_b: mx.array | None = None  # g B^T [N, r], summed over blocks
        self._db: list[mx.array] = []

    def forward(self, start: int, stop: int) -> mx.array:
        """Columns [start, stop) of y, not evaluated."""
        assert self.x is not None
        y = self.model.piece_of_rows(self.linear, start, stop).forward(self.x)
        bias = self.model.bias(self.linear, start, stop)
        if bias is not None:
            y = y + bias
        if self.low_rank is not None and self.pair is not None:
            y = y + (self.low_rank @ self.pair.b[:, start:stop]).astype(y.dtype)
        return y

    def backward(self, start: int, stop: int, g: mx.array, want_dx: bool) -> None:
        """Take g = dL/dy [N, stop - start] of those columns; ranges must come in order."""
        if want_dx:
            part = self.model.piece_of_rows(self.linear, start, stop).backward(g)
            self.dx = _added(self.dx, part)
            mx.eval(self.dx)
        if self.pair is not None and self.low_rank is not None:
            g = g.astype(mx.float32)
            part = g @ self.pair.b[:, start:stop].T
            self._g_b = part if self._g_b is None else self._g_b + part
            self._db.append(self.low_rank.astype(mx.float32).T @ g)
            mx.eval(self._g_b, self._db[-1])

    def finish(self) -> tuple[mx.array | None, Pair | None]:
        """(dx [N, in] or None, float32 gradients of the pair or None), after the last range."""
        if self.pair is None or self._g_b is None:
            return self._rounded(self.dx), None
        low_rank = self.scale * self._g_b
        if self.dx is not None:
            added = low_rank @ self.pair.a.T
            self.dx = self._rounded(self.dx + (added if self.mask is None else added * self.mask))
        gradients = Pair(self._dropped().astype(mx.float32).T @ low_rank, _join(self._db))
        mx.eval(self.dx, gradients)
        return self.dx, gradients

    def _rounded(self, dx: mx.array | None) -> mx.array | None:
        return None if dx is None else dx.astype(self.model.dtype)

    def _dropped(self) -> mx.array:
        assert self.x is not None
        return self.x if self.mask is None else self.x * self.mask


class ColumnStream:
    """A projection whose input comes in ranges of columns x_b [N, stop - start], in order; y [N, out] is summed up.

    g: dL/dy [N, out] for the backward pass, None for the forward pass.
    """

    def __init__(self, model: Model, linear: Linear, pair: Pair | None, scale: float, g: mx.array | None = None):
        self.model, self.linear, self.pair, self.scale, self.g = model, linear, pair, scale, g
        self.y: mx.array | None = None
        self._x_a: mx.array | None = None  # dropout(x) A [N, r], summed over blocks
        self._da: list[mx.array] = []
        self._low_rank: mx.array | None = None  # s g B^T [N, r]
        if pair is not None and g is not None:
            self._low_rank = scale * (g.astype(mx.float32) @ pair.b.T)
            mx.eval(self._low_rank)

    def forward(self, start: int, stop: int, x: mx.array, mask: mx.array | None) -> None:
        """Add the part of y that these columns of x give."""
        part = self.model.piece_of_columns(self.linear, start, stop).forward(x)
        self.y = _added(self.y, part)
        self._add_x_a(start, stop, x, mask)
        mx.eval(self.y)

    def output(self) -> mx.array:
        """y [N, out], after the last range."""
        assert self.y is not None
        bias = self.model.bias(self.linear, 0, self.linear.out_dims)
        y = self.y if bias is None else self.y + bias
        if self.pair is not None and self._x_a is not None:
            y = y + (self.scale * self._x_a) @ self.pair.b
        return y.astype(self.model.dtype)

    def cotangent(self, start: int, stop: int, mask: mx.array | None) -> mx.array:
        """Columns [start, stop) of dL/dx, not evaluated."""
        assert self.g is not None
        dx = self.model.piece_of_columns(self.linear, start, stop).backward(self.g)
        if self.pair is not None and self._low_rank is not None:
            added = self._low_rank @ self.pair.a[start:stop].T
            dx = dx + (added if mask is None else added * mask).astype(dx.dtype)
        return dx

    def take(self, start: int, stop: int, x: mx.array, mask: mx.array | None) -> None:
        """What these columns of x give to the pair's gradients."""
        if self.pair is None or self._low_rank is None:
            return
        self._add_x_a(start, stop, x, mask)
        dropped = (x if mask is None else x * mask).astype(mx.float32)
        self._da.append(dropped.T @ self._low_rank)
        mx.eval(self._da[-1])

    def gradients(self) -> Pair | None:
        """Float32 gradients of the pair, or None, after the last range."""
        if self.pair is None or self.g is None or self._x_a is None:
            return None
        found = Pair(_join(self._da, axis=0), (self.scale * self._x_a.astype(mx.float32)).T @ self.g.astype(mx.float32))
        mx.eval(found)
        return found

    def _add_x_a(self, start: int, stop: int, x: mx.array, mask: mx.array | None) -> None:
        if self.pair is None:
            return
        part = (x if mask is None else x * mask) @ self.pair.a[start:stop]
        self._x_a = part if self._x_a is None else self._x_a + part
        mx.eval(self._x_a)


def forward(model: Model, plan: Plan, stream: RowStream) -> mx.array:
    """y [N, out] of a whole projection."""
    pieces = []
    for start, stop in row_blocks(model, plan, stream.linear):
        pieces.append(stream.forward(start, stop))
        mx.eval(pieces[-1])
    return _join(pieces)


def backward(
    model: Model, plan: Plan, stream: RowStream, g: mx.array, want_dx: bool
) -> tuple[mx.array | None, Pair | None]:
    """(dx [N, in] or None, gradients of the pair or None) of a whole projection from g = dL/dy [N, out]."""
    for start, stop in row_blocks(model, plan, stream.linear):
        stream.backward(start, stop, g[:, start:stop], want_dx)
    return stream.finish()


def row_blocks(model: Model, plan: Plan, linear: Linear) -> list[tuple[int, int]]:
    """The row ranges [start, stop) in which a matrix is brought in."""
    rows = plan.rows_per_block(linear.in_dims, model.dtype.size)
    return [(start, min(start + rows, linear.out_dims)) for start in range(0, linear.out_dims, rows)]


def _added(total: mx.array | None, part: mx.array) -> mx.array:
    """A sum over blocks, in float32: in 16 bits every block would round it once more."""
    part = part.astype(mx.float32)
    return part if total is None else total + part


def _join(pieces: list[mx.array], axis: int = 1) -> mx.array:
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=axis)
