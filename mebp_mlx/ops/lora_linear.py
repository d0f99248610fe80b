"""A frozen matrix with its LoRA pair: the projection of all families.

    y = x W^T + b + s (dropout(x) A) B
    dB = s (xA)^T g,  dA = s x^T (g B^T),  dx = g W + s (g B^T) A^T      (x after dropout in the LoRA terms)

DoRA's pairs have row lengths m:  y = c (x W^T + s (dropout(x) A) B) + b,  c = m / n,  n = |W + s (A B)^T| by rows:
    dm = sum over positions of g (y - b) / m, taken as g (x W^T + s (xA) B) / n;  all else as above, with c g for g
    n^2 = |W|^2 + 2 s (W A) B + s^2 B^T (A^T A) B,  the diagonal of each by rows: n needs no matrix [out, in]
(mlx-lm's DoRALinear; n is a constant for the gradients.) dm needs the product x W^T once more in the backward pass.

xA is seldom kept: recomputing its r columns is cheaper than storing them, unless kernel launches matter. W may come in
blocks of rows, which are columns of y, or of columns, which are columns of x (`Input`). Sums over blocks and over tiles
are float32. Slicing a whole array and concatenating a single one cost nothing.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from ..model.base import WeightBlock, rows_of
from ..model.config import Linear
from ..model.lora import Dropout, Pair
from .plan import Context


class Memory(Protocol):
    """Values that a block keeps of its tiles, by name and position (families/base.py: BlockKept)."""

    def keeps(self, name: str) -> bool: ...

    def put(self, name: str, position: int, value: mx.array) -> bool: ...

    def take(self, name: str, position: int) -> mx.array | None: ...


class Shared:
    """State shared by the projections of one block.

    memory: keeps s (xA), r columns, as "low.SHORT" if the plan names it. gradients: sums of the pairs' gradients,
    float32, by parameter name.
    """

    def __init__(self, context: Context, memory: Memory):
        adapter, parts = context.adapter, context.dropout_parts
        self.context, self.memory, self.keeps_low = context, memory, memory.keeps("low")
        self.dropout = None if parts is None or not adapter.dropout else Dropout(adapter.dropout, parts)
        self.gradients: dict[str, mx.array] = {}
        self._value: mx.array | None = None
        self._wide: mx.array | None = None

    def wide(self, x: mx.array) -> mx.array:
        """A value in float32, converted once for all projections that read it."""
        if x.dtype.size >= 4:
            return x
        if x is not self._value:
            self._value, self._wide = x, x.astype(mx.float32)
        assert self._wide is not None
        return self._wide

    def clear(self) -> None:
        """Drops the converted values."""
        self._value = self._wide = None


class LoraLinear:
    """One projection of a block, applied tile by tile. short: its name in the block."""

    def __init__(self, shared: Shared, short: str, linear: Linear):
        context = shared.context
        self.shared, self.short, self.low_name, self.linear = shared, short, f"low.{short}", linear
        self.model, self.plan, self.barrier, self.memory = context.model, context.plan, context.barrier, shared.memory
        self.scale = context.adapter.scale
        self.whole = self.pair_of()  # of the matrix that holds this projection's rows
        self.pair = None if self.whole is None else self._own(self.whole)
        row_bytes = self.model.copied_bytes(linear, linear.in_dims)
        self.row_blocks = self.plan.row_blocks(linear.out_dims, row_bytes)  # row ranges of W that are read at a time

    def pair_of(self) -> Pair | None:
        """The pair of the matrix; None: it is not trained."""
        return self.shared.context.adapter.pairs.get(self.linear.name)

    @property
    def _rows(self) -> slice:
        return rows_of(self.linear, 0, self.linear.out_dims)

    def _own(self, whole: Pair) -> Pair:
        """The part of a matrix's pair that belongs to this projection's rows."""
        if whole.b.shape[1] == self.linear.out_dims:
            return whole
        return Pair(whole.a, whole.b[:, self._rows], None if whole.m is None else whole.m[self._rows])

    def __call__(self, x: mx.array, position: int) -> mx.array:
        """x [B, tile, in] from a position on -> y [B, tile, out] in the compute dtype."""
        low = self.low_rank(x, position)
        pieces = []
        for start, stop in self.row_blocks:
            pieces.append(self.rows(x, low, start, stop))
            self.barrier.piece(pieces[-1])
        return mx.concatenate(pieces, axis=-1)

    def backward(self, x: mx.array | None, g: mx.array, position: int, need_dx: bool) -> mx.array | None:
        """dL/dx from g = dL/dy [B, tile, out], not rounded to the compute dtype, or None; accumulates the pair's
        gradients. x: needed only with a pair.
        """
        backward = Backward(self, x, position, need_dx)
        for start, stop in self.row_blocks:
            backward.take(start, stop, g[..., start:stop])
        return backward.finish()

    def low_rank(self, x: mx.array, position: int) -> mx.array | None:
        """s (dropout(x) A) [B, tile, r], or None without a pair."""
        if self.pair is None:
            return None
        low = self.memory.take(self.low_name, position) if self.shared.keeps_low else None
        if low is None:
            low = self.scale * (self.dropped(self.shared.wide(x), x, position) @ self.pair.a)
            self.barrier.piece(low)
            if self.shared.keeps_low:
                self.memory.put(self.low_name, position, low)
        return low

    def rows(
        self, x: mx.array, low: mx.array | None, start: int, stop: int, block: WeightBlock | None = None
    ) -> mx.array:
        """Columns [start, stop) of y. block: those rows of the matrix; None reads them."""
        block = block or self.block(start, stop)
        y, c = block.matmul(x), self.factor(start, stop, block)
        bias = self.model.bias(self.linear, start, stop)
        if bias is not None and c is None:
            y = y + bias
        if low is not None:
            y = self.with_low(y, low, start, stop)
        return y if c is None else _stretched(y, c, bias)

    def block(self, start: int, stop: int) -> WeightBlock:
        """Rows [start, stop) of the matrix."""
        return self.model.row_block(self.linear, start, stop)

    def with_low(self, y: mx.array, low: mx.array, start: int, stop: int) -> mx.array:
        """y + low B, columns [start, stop)."""
        assert self.pair is not None
        b = self.pair.b[:, start:stop]
        return mx.addmm(y, low, b) if y.dtype == low.dtype else y + (low @ b).astype(y.dtype)

    def factor(self, start: int, stop: int, block: WeightBlock | None = None) -> mx.array | None:
        """DoRA's c for rows [start, stop) of the matrix, float32; None for a LoRA pair. block: those rows."""
        if self.pair is None or self.pair.m is None:
            return None
        return self.pair.m[start:stop] / self.row_lengths(start, stop, block)

    def row_lengths(self, start: int, stop: int, block: WeightBlock | None = None) -> mx.array:
        """n of rows [start, stop), float32; computed once per pass. block: those rows; None reads them."""
        first = self.linear.first_row
        known, key = self.shared.context.row_lengths, (self.linear.name, first + start, first + stop)
        if key in known:
            return known[key]
        assert self.pair is not None
        block = block or self.model.row_block(self.linear, start, stop)
        a, b = mx.stop_gradient(self.pair.a), mx.stop_gradient(self.pair.b)[:, start:stop]
        cross = (block.matmul(a.T).astype(mx.float32) * b).sum(axis=0)
        own = (b * ((a.T @ a) @ b)).sum(axis=0)
        base = self.model.squared_norms(self.linear)[start:stop]
        n = mx.sqrt(mx.maximum(base + 2 * self.scale * cross + self.scale**2 * own, 0))
        self.barrier.piece(n)
        if self.barrier.grain is not None:  # a traced pass must not reuse another's
            known[key] = n
        return n

    def all_factors(self) -> mx.array | None:
        """c of all rows, for input in column ranges; None for a LoRA pair."""
        if self.pair is None or self.pair.m is None:
            return None
        return self.pair.m / self.all_lengths()

    def all_lengths(self) -> mx.array:
        """n of all rows."""
        return mx.concatenate([self.row_lengths(start, stop) for start, stop in self.row_blocks])

    def add(self, part: str, gradient: mx.array) -> None:
        """Adds to a gradient of the pair; part: "lora_a", "lora_b" or "m"."""
        name = f"{self.linear.name}.{part}"
        gradients = self.shared.gradients
        if part != "lora_a" and self.whole is not None and self.pair is not self.whole:
            whole = gradients.get(name)
            if whole is None:
                whole = mx.zeros((*gradient.shape[:-1], self.whole.b.shape[1]))
            gradients[name] = whole.at[..., self._rows].add(gradient)
            self.barrier.piece(gradients[name])
            return
        gradients[name] = gradients[name] + gradient if name in gradients else gradient
        self.barrier.piece(gradients[name])

    def dropped(self, x: mx.array, rows: mx.array, position: int, start: int = 0, stop: int | None = None) -> mx.array:
        """Columns [start, stop) of the pair's input, or of its cotangent, after dropout.

        rows [B, tile, ...]: sets the mask's shape; its first row is at `position`.
        """
        dropout = self.shared.dropout
        if dropout is None:
            return x
        stop = self.linear.in_dims if stop is None else stop
        return x * dropout.mask(self.linear.name, rows.shape[:2], position, (start, stop), rows.dtype)


class Backward:
    """A projection's backward, from the columns of g in order."""

    def __init__(self, linear: LoraLinear, x: mx.array | None, position: int, need_dx: bool):
        self.linear, self.x, self.position, self.need_dx = linear, x, position, need_dx
        self.low = None if x is None else linear.low_rank(x, position)
        self.dx: mx.array | None = None
        self.g_b: mx.array | None = None  # g B^T [B, tile, r]
        self.db: list[mx.array] = []
        self.dm: list[mx.array] = []

    def take(self, start: int, stop: int, g: mx.array, block: WeightBlock | None = None) -> None:
        """Takes g = dL/dy [B, tile, stop - start]. block: those rows of the matrix; None reads them."""
        linear, pair, barrier = self.linear, self.linear.pair, self.linear.barrier
        is_dora = pair is not None and pair.m is not None
        if block is None and (self.need_dx or is_dora):
            block = linear.block(start, stop)
        if is_dora and block is not None:
            g = self._through_lengths(start, stop, g, block)
        if self.need_dx and block is not None:
            part = block.matmul_t(g)
            self.dx = part if stop - start == linear.linear.out_dims else _added(self.dx, part)
            barrier.piece(self.dx)
        if pair is not None and self.low is not None:
            g = g.astype(mx.float32)
            self.g_b = _added(self.g_b, g @ pair.b[:, start:stop].T)
            self.db.append(_flat(self.low).T @ _flat(g))
            barrier.piece(self.g_b, self.db[-1])

    def _through_lengths(self, start: int, stop: int, g: mx.array, block: WeightBlock) -> mx.array:
        """c g; adds those columns' dm."""
        linear = self.linear
        assert self.x is not None and self.low is not None
        y = linear.with_low(block.matmul(self.x), self.low, start, stop)
        self.dm.append(_sum_of_products(g, y) / linear.row_lengths(start, stop, block))
        linear.barrier.piece(self.dm[-1])
        c = linear.factor(start, stop, block)
        assert c is not None
        return g * c.astype(g.dtype)

    def finish(self) -> mx.array | None:
        """dx, after the last column; not rounded to the compute dtype, since several may be summed."""
        linear, pair = self.linear, self.linear.pair
        if pair is None or self.g_b is None or self.x is None:
            return self.dx
        g_b = linear.scale * self.g_b
        linear.add("lora_a", _flat(linear.dropped(linear.shared.wide(self.x), self.x, self.position)).T @ _flat(g_b))
        linear.add("lora_b", mx.concatenate(self.db, axis=-1))
        if self.dm:
            linear.add("m", mx.concatenate(self.dm))
        if self.dx is None:
            return None
        if linear.shared.dropout is None:
            self.dx = mx.addmm(self.dx.astype(mx.float32), g_b, pair.a.T)
        else:
            self.dx = self.dx + linear.dropped(g_b @ pair.a.T, self.x, self.position)
        linear.barrier.piece(self.dx)
        return self.dx


class Input:
    """A projection whose input x comes in ranges of columns, in order: the same equations, summing y.

    g: dL/dy [B, tile, out] for a backward pass, None for a forward pass.
    """

    def __init__(self, linear: LoraLinear, position: int, g: mx.array | None = None):
        self.linear, self.position, self.g = linear, position, g
        self.dy: mx.array | None = None  # g, if DoRA's dm needs it
        c = None if g is None else linear.all_factors()
        if g is not None and c is not None:
            self.dy = g
            g = self.g = g * c.astype(g.dtype)
        self.y: mx.array | None = None
        self.x_a: mx.array | None = None  # dropout(x) A [B, tile, r]
        self.da: list[mx.array] = []
        self.g_b: mx.array | None = None
        self.sums_x_a = True
        if g is not None and linear.pair is not None:
            self.x_a = linear.memory.take(linear.low_name, position)
            self.sums_x_a = self.x_a is None
            self.g_b = linear.scale * (g.astype(mx.float32) @ linear.pair.b.T)
            linear.barrier.piece(self.g_b)

    def add(self, start: int, stop: int, x: mx.array) -> None:
        """Adds the part of y from these columns of x."""
        linear = self.linear.linear
        part = self.linear.model.column_block(linear, start, stop).matmul(x)
        self.y = part if stop - start == linear.in_dims else _added(self.y, part)
        self._add_x_a(start, stop, x)
        self.linear.barrier.piece(self.y)

    def output(self) -> mx.array:
        """y [B, tile, out], after the last columns."""
        linear = self.linear
        assert self.y is not None
        bias, c = linear.model.bias(linear.linear, 0, linear.linear.out_dims), linear.all_factors()
        y = self.y if bias is None or c is not None else self.y + bias
        if linear.pair is not None and self.x_a is not None:
            linear.memory.put(linear.low_name, self.position, self.x_a)
            y = y + ((linear.scale * self.x_a) @ linear.pair.b).astype(y.dtype)
        return (y if c is None else _stretched(y, c, bias)).astype(linear.model.dtype)

    def cotangent(self, start: int, stop: int) -> mx.array:
        """Columns [start, stop) of dL/dx."""
        linear, g = self.linear, self.g
        assert g is not None
        dx = linear.model.column_block(linear.linear, start, stop).matmul_t(g)
        if linear.pair is not None and self.g_b is not None:
            dx = dx + linear.dropped(self.g_b @ linear.pair.a[start:stop].T, g, self.position, start, stop).astype(
                dx.dtype
            )
        return dx

    def take(self, start: int, stop: int, x: mx.array) -> None:
        """Adds the part of the pair's gradients from these columns of x."""
        if self.g_b is None:
            return
        dropped = self._add_x_a(start, stop, x.astype(mx.float32))
        self.da.append(_flat(dropped).T @ _flat(self.g_b))
        self.linear.barrier.piece(self.da[-1])
        if self.dy is not None:
            linear = self.linear.linear
            self.y = _added(self.y, self.linear.model.column_block(linear, start, stop).matmul(x))
            self.linear.barrier.piece(self.y)

    def finish(self) -> None:
        """Adds the pair's gradients, after the last columns."""
        if self.g is None or self.x_a is None or not self.da:
            return
        x_a = _flat(self.linear.scale * self.x_a).astype(mx.float32)
        self.linear.add("lora_a", mx.concatenate(self.da))
        self.linear.add("lora_b", x_a.T @ _flat(self.g).astype(mx.float32))
        if self.dy is not None and self.y is not None and self.linear.pair is not None:
            y = _flat(self.y) + x_a @ self.linear.pair.b
            self.linear.add("m", _sum_of_products(self.dy, y) / self.linear.all_lengths())

    def _add_x_a(self, start: int, stop: int, x: mx.array) -> mx.array:
        linear, pair = self.linear, self.linear.pair
        if pair is None:
            return x
        dropped = linear.dropped(x, x, self.position, start, stop)
        if not self.sums_x_a:
            return dropped
        part = dropped @ pair.a[start:stop]
        self.x_a = part if self.x_a is None else self.x_a + part
        linear.barrier.piece(self.x_a)
        return dropped


def _added(total: mx.array | None, part: mx.array) -> mx.array:
    """A sum over blocks, in float32: in 16 bits, every block would round it again."""
    part = part.astype(mx.float32)
    return part if total is None else total + part


def _stretched(y: mx.array, c: mx.array, bias: mx.array | None) -> mx.array:
    """DoRA's c y + b."""
    y = y * c.astype(y.dtype)
    return y if bias is None else y + bias


def _sum_of_products(g: mx.array, y: mx.array) -> mx.array:
    """The sum of g y over rows and positions, float32 [width]."""
    return (_flat(g).astype(mx.float32) * _flat(y).astype(mx.float32)).sum(axis=0)


def _flat(x: mx.array) -> mx.array:
    """[B, tile, width] as [B * tile, width]."""
    return x.reshape(-1, x.shape[-1])
