"""The gated MLP in blocks of its inner width: gate, up, activation and down, a range of columns at a time.

No [N, F] array exists in either direction: a block's g and u go to the arena or are computed
again, and what the block gives to the output, to dx and to the gradients is summed up.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..model.frozen import Model
from ..model.lora import DROPOUT_COLUMNS, Pair
from ..model.spec import Layer, Linear
from .host import gate_backward, gate_forward
from .plan import Plan
from .projection import ColumnStream, RowStream

Gate = Callable[[mx.array, mx.array], mx.array]
Mask = Callable[[Linear, int, int], "mx.array | None"]  # dropout's factor on columns [start, stop) of a linear's input
Gradients = dict[str, Pair]
NAMES = ("gate", "up", "down")


class BlockwiseMlp:
    """One block's MLP on x [N, D]. pairs: by short name; mask: dropout's factors, drawn when asked for."""

    def __init__(
        self,
        model: Model,
        plan: Plan,
        layer: Layer,
        activation: Gate,
        x: mx.array,
        pairs: dict[str, Pair | None],
        scale: float,
        mask: Mask,
    ):
        self.model, self.activation, self.pairs, self.scale, self.mask = model, activation, pairs, scale, mask
        self.linears = {name: layer.linears[name] for name in NAMES}
        self.gate, self.up = (
            RowStream(model, linear, x, pairs[name], scale, mask(linear, 0, linear.in_dims))
            for name, linear in self.linears.items()
            if name != "down"
        )
        down = self.linears["down"]
        step = plan.mlp_columns(down.out_dims, model.dtype.size)
        assert step % DROPOUT_COLUMNS == 0
        self.blocks = [(start, min(start + step, down.in_dims)) for start in range(0, down.in_dims, step)]

    def forward(self, save: Callable[[str, int, mx.array], None]) -> mx.array:
        """The MLP's output [N, D]; save("g" or "u", block, value) is told every block's values."""
        down = ColumnStream(self.model, self.linears["down"], self.pairs["down"], self.scale)
        for block, (start, stop) in enumerate(self.blocks):
            g = self.gate.forward(start, stop)
            mx.eval(g)
            save("g", block, g)
            u = self.up.forward(start, stop)
            mx.eval(u)
            save("u", block, u)
            m = gate_forward(self.activation, g, u)
            del g, u
            mx.eval(m)
            down.forward(start, stop, m, self.mask(self.linears["down"], start, stop))
            del m
        y = down.output()
        mx.eval(y)
        return y

    def backward(
        self, dy: mx.array, load: Callable[[str, int], mx.array | None], want_dx: bool
    ) -> tuple[mx.array | None, Gradients]:
        """(dx [N, D] or None, gradients by short name) from dy [N, D]; load gives a saved g or u block, or None."""
        down = ColumnStream(self.model, self.linears["down"], self.pairs["down"], self.scale, dy)
        inner = want_dx or self.pairs["gate"] is not None or self.pairs["up"] is not None
        for block, (start, stop) in enumerate(self.blocks):
            g, u = load("g", block), load("u", block)
            g = self.gate.forward(start, stop) if g is None else g
            mx.eval(g)
            u = self.up.forward(start, stop) if u is None else u
            mx.eval(u)
            mask = self.mask(self.linears["down"], start, stop)
            if not inner:
                down.take(start, stop, gate_forward(self.activation, g, u), mask)
                continue
            dm = down.cotangent(start, stop, mask)
            mx.eval(dm)
            m, dg, du = gate_backward(self.activation, g, u, dm)
            del g, u, dm
            mx.eval(m, dg, du)
            down.take(start, stop, m, mask)
            del m
            self.gate.backward(start, stop, dg, want_dx)
            del dg
            self.up.backward(start, stop, du, want_dx)
            del du
        found = {"down": down.gradients()}
        d_gate, found["gate"] = self.gate.finish()
        d_up, found["up"] = self.up.finish()
        dx = None if d_gate is None or d_up is None else d_gate + d_up
        return dx, {name: pair for name, pair in found.items() if pair is not None}
