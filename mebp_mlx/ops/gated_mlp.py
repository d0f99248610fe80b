"""The gated MLP: d = (act(x Wg^T) * (x Wu^T)) Wd^T, each W with its LoRA pair.

If W is read in blocks, so is the inner width F: no [tile, F] array exists in either direction. The blocks'
contributions to the output, dx and the gradients are summed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ..kernels import cpu
from .lora_linear import Backward, Input, LoraLinear


@dataclass(frozen=True)
class Gate:
    """m = act(g) * u, forward and backward: as MLX operations, and by numpy in place (cpu.py; None: not available)."""

    plain: Callable[[mx.array, mx.array], mx.array]
    plain_backward: Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array, mx.array]]
    on_cpu: cpu.Forward | None = None
    on_cpu_backward: cpu.Backward | None = None

    def __call__(self, g: mx.array, u: mx.array, in_place: bool = False) -> mx.array:
        """m in the shape of g, u; in_place: the caller owns g's memory, which may hold m."""
        if self.on_cpu is None or not cpu.serves(g, u):
            return self.plain(g, u)
        return cpu.gate_forward(self.on_cpu, g, u, in_place)

    def backward(self, g: mx.array, u: mx.array, dm: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """(m, dg, du) from dm = dL/dm; all three arguments' memory may be reused."""
        if self.on_cpu_backward is None or not cpu.serves(g, u, dm):
            return self.plain_backward(g, u, dm)
        return cpu.gate_backward(self.on_cpu_backward, g, u, dm)


def _silu(g: mx.array, u: mx.array) -> mx.array:
    return g * mx.sigmoid(g) * u


def _silu_backward(g: mx.array, u: mx.array, dm: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    s = mx.sigmoid(g)
    act = g * s
    return act * u, dm * u * (s + act * (1 - s)), dm * act


def _gelu_tanh(g: mx.array, u: mx.array) -> mx.array:
    return 0.5 * g * (1 + mx.tanh(0.7978845608028654 * (g + 0.044715 * g**3))) * u


def _gelu_tanh_backward(g: mx.array, u: mx.array, dm: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    (m,), (dg, du) = mx.vjp(_gelu_tanh, [g, u], [dm])
    return m, dg, du


def _clipped(g: mx.array, u: mx.array) -> mx.array:
    g, u = mx.minimum(g, 7.0), mx.clip(u, -7.0, 7.0)
    return g * mx.sigmoid(1.702 * g) * (u + 1)


def _clipped_backward(g: mx.array, u: mx.array, dm: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    (m,), (dg, du) = mx.vjp(_clipped, [g, u], [dm])
    return m, dg, du


SILU = Gate(_silu, _silu_backward, cpu.silu, cpu.silu_backward)
GELU_TANH = Gate(_gelu_tanh, _gelu_tanh_backward, cpu.gelu_tanh, cpu.gelu_tanh_backward)  # gelu's tanh approximation
CLIPPED = Gate(_clipped, _clipped_backward)  # gpt-oss's: act(g) = g sigmoid(1.702 g), g at most 7, u + 1 for u in +-7


class GatedMlp:
    """gate, up, down: the three projections. Values g and u of a block of F are kept as "g.0", "u.0", "g.1", ..."""

    def __init__(self, gate: LoraLinear, up: LoraLinear, down: LoraLinear, act: Gate):
        self.gate, self.up, self.down, self.act, self.barrier = gate, up, down, act, down.barrier
        F, D = down.linear.in_dims, down.linear.out_dims
        self.blocks = down.plan.column_blocks(F, down.model.copied_bytes(down.linear, D))

    def __call__(self, x: mx.array, position: int) -> mx.array:
        """x [B, tile, D] from a position on -> d [B, tile, D]."""
        gate_low, up_low = self.gate.low_rank(x, position), self.up.low_rank(x, position)
        down, memory = Input(self.down, position), self.down.memory
        for block, (start, stop) in enumerate(self.blocks):
            g = self.gate.rows(x, gate_low, start, stop)
            self.barrier.piece(g)
            is_in_use = memory.put(f"g.{block}", position, g)
            u = self.up.rows(x, up_low, start, stop)
            self.barrier.piece(u)
            memory.put(f"u.{block}", position, u)
            m = self.act(g, u, in_place=not is_in_use)
            del g, u
            self.barrier.piece(m)
            down.add(start, stop, m)
            del m
        return down.output()

    def backward(self, x: mx.array, dy: mx.array, position: int, need_dx: bool) -> mx.array | None:
        """dL/dx from dy = dL/dd [B, tile, D], or None."""
        inner = need_dx or self.gate.pair is not None or self.up.pair is not None
        down, memory = Input(self.down, position, dy), self.down.memory
        gate, up = (Backward(linear, x, position, need_dx) for linear in (self.gate, self.up))
        for block, (start, stop) in enumerate(self.blocks):
            g, u = (memory.take(f"{name}.{block}", position) for name in "gu")
            g = self.gate.rows(x, gate.low, start, stop) if g is None else g
            u = self.up.rows(x, up.low, start, stop) if u is None else u
            self.barrier.piece(g, u)
            if not inner:
                down.take(start, stop, self.act(g, u, in_place=True))
                continue
            dm = down.cotangent(start, stop)
            self.barrier.piece(dm)
            m, dg, du = self.act.backward(g, u, dm)
            del g, u, dm
            self.barrier.piece(m, dg, du)
            down.take(start, stop, m)
            del m
            gate.take(start, stop, dg)
            del dg
            up.take(start, stop, du)
            del du
        down.finish()
        d_gate, d_up = gate.finish(), up.finish()
        return None if d_gate is None or d_up is None else (d_gate + d_up).astype(x.dtype)
