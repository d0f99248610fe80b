"""Runs a block forward and backward over tiles of the sequence: one stage at a time, each evaluated before the next.

All stages but attention work on a tile (a range of positions, all rows of the batch) by
itself, so no token-wise value ever exists for the whole sequence at once. Attention takes a
tile's queries and the keys and values of everything before them.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import mlx.core as mx

from ..model.decoder import INPUT, OUTPUT, Stage, block_stages, segments
from ..model.frozen import Model
from ..model.lora import Pair, dropout_mask
from ..model.spec import Layer, Linear
from . import projection
from .arena import Arena
from .attend import TileAttention
from .plan import Plan
from .schedule import Op, backward_ops, forward_ops, needs_gradient

Values = dict[str, mx.array]
Tiles = list[mx.array]
QKV = ("q", "k", "v")


class Adapter(Protocol):
    """What a block needs to know of the trainable parameters; Lora is one, a perturbed Lora another."""

    scale: float
    dropout: float

    def pair(self, linear: Linear) -> Pair | None: ...

    def trains(self, linear: Linear) -> bool: ...


class BlockRunner:
    """Runs blocks of one model forward and backward on sequences cut into tiles.

    adapter: the trainable pairs; arena: where saved values go (None for forward-only use);
    dropout_parts: what dropout's random keys are made of besides projection and position
    (None: no dropout), so that recomputation draws the same mask.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        adapter: Adapter,
        arena: Arena | None = None,
        dropout_parts: tuple[int, ...] | None = None,
    ):
        self.model, self.plan, self.adapter, self.arena = model, plan, adapter, arena
        self.dropout_parts = dropout_parts if adapter.dropout > 0 else None
        self.stages = block_stages(model.spec)
        self.before, self.after = segments(self.stages)
        self.saved = plan.saved_for(model.spec)

    def trained(self, layer: Layer) -> frozenset[str]:
        """The short names of the projections of a block that have a pair."""
        return frozenset(short for short, linear in layer.linears.items() if self.adapter.trains(linear))

    def forward(self, layer: Layer, x: Tiles, save: bool) -> Tiles:
        """Tiles of x [B, tile, D] (emptied) -> tiles of y; with `save`, the arena gets what the backward needs."""
        starts = _starts(x)
        work = _Work(self, layer, starts)
        saved = self.saved if save else frozenset()
        before, after = forward_ops(self.before, saved, keep=(INPUT, *QKV)), forward_ops(self.after, saved)
        n_tiles = len(x)
        found: dict[str, Tiles] = {name: [] for name in QKV}
        for tile in range(n_tiles):
            values = {INPUT: x[tile]}
            if save:
                work.save(INPUT, tile, x[tile])
            work.carry_out(before, values, tile, starts[tile])
            for name in QKV:
                found[name].append(values[name])
        attention = TileAttention(self.model.spec, layer, work.norms, self.plan, found.pop("k"), found.pop("v"))
        y: Tiles = []
        for tile in range(n_tiles):
            a = attention.forward(found["q"].pop(0), starts[tile])
            if "a" in saved:
                work.save("a", tile, a)
            values = {INPUT: x.pop(0), "a": a}
            del a
            work.carry_out(after, values, tile, starts[tile])
            y.append(values[OUTPUT])
        return y

    def backward(self, layer: Layer, dy: Tiles, want_dx: bool) -> tuple[Tiles, dict[str, mx.array]]:
        """Tiles of dL/dy -> (tiles of dL/dx, or none unless wanted; LoRA gradients by parameter name, float32)."""
        trained = self.trained(layer)
        useful = needs_gradient(self.stages, trained, want_dx)
        starts, n_tiles = _starts(dy), len(dy)
        work = _Work(self, layer, starts)
        needs_attention = useful["a"]
        available = self.saved | {INPUT, "a"}
        ops = backward_ops(self.after, available, trained, useful)
        dx: list[mx.array | None] = []
        dq: Tiles = []
        for tile in range(n_tiles):
            cotangents = {OUTPUT: dy.pop(0)}
            work.carry_out(ops, {}, tile, starts[tile], cotangents)
            dx.append(cotangents.get(INPUT))
            if needs_attention:
                q = work.fetch("q", tile, starts[tile])
                dq.append(work.attention.backward(q, cotangents.pop("a"), starts[tile]))
                del q
        if needs_attention:
            d_keys, d_values = work.attention.finish()
            del work.attention
            ops = backward_ops(self.before, self.saved | {INPUT}, trained, useful)
            for tile in range(n_tiles):
                start, stop = starts[tile], starts[tile] + dq[0].shape[1]
                cotangents = {"q": dq.pop(0), "k": d_keys[:, start:stop], "v": d_values[:, start:stop]}
                residual = dx[tile]
                if residual is not None:
                    cotangents[INPUT] = residual
                work.carry_out(ops, {}, tile, start, cotangents)
                dx[tile] = cotangents.get(INPUT)
        return [part for part in dx if part is not None] if want_dx else [], work.gradients


def _starts(tiles: Tiles) -> list[int]:
    """The position of each tile's first row."""
    starts = [0]
    for tile in tiles:
        starts.append(starts[-1] + tile.shape[1])
    return starts[:-1]


class _Work:
    """One block's norms and gradients while its operations are carried out, tile by tile."""

    def __init__(self, runner: BlockRunner, layer: Layer, starts: list[int]):
        self.runner, self.layer, self.starts = runner, layer, starts
        self.norms = runner.model.norms(layer)
        self.gradients: dict[str, mx.array] = {}

    @cached_property
    def attention(self) -> TileAttention:
        """The block's attention on saved or recomputed keys and values, made when something first needs it."""
        k, v = ([self.fetch(name, tile, start) for tile, start in enumerate(self.starts)] for name in ("k", "v"))
        return TileAttention(self.runner.model.spec, self.layer, self.norms, self.runner.plan, k, v)

    def carry_out(
        self,
        ops: list[Op],
        values: Values,
        tile: int,
        start: int,
        cotangents: Values | None = None,
    ) -> None:
        """Carry out the operations on one tile, whose first position is `start`."""
        for op in ops:
            if op.kind == "drop":
                values.pop(op.value, None)
            elif op.kind == "save":
                self.save(op.value, tile, values[op.value])
            elif op.kind == "load":
                values[op.value] = self.fetch(op.value, tile, start)
            elif op.kind == "run":
                assert op.stage is not None
                values[op.stage.output] = self._forward(op.stage, values, start)
            else:
                assert op.stage is not None and cotangents is not None
                self._backward(op.stage, values, cotangents, op.wanted, start)

    def save(self, name: str, tile: int, value: mx.array) -> None:
        assert self.runner.arena is not None
        self.runner.arena.put(self.layer.index, name, tile, value)

    def fetch(self, name: str, tile: int, start: int) -> mx.array:
        """A tile of a value: from the arena if it is saved, computed again otherwise."""
        if name in self.runner.saved or name == INPUT:
            assert self.runner.arena is not None
            return self.runner.arena.get(self.layer.index, name, tile)
        if name == "a":
            return self.attention.forward(self.fetch("q", tile, start), start)
        values: Values = {INPUT: self.fetch(INPUT, tile, start)}
        needed = [stage for stage in self.runner.before if stage.output in (name, "h")]
        self.carry_out(forward_ops(tuple(needed), frozenset(), keep=(name,)), values, tile, start)
        return values[name]

    def _forward(self, stage: Stage, values: Values, start: int) -> mx.array:
        inputs = [values[name] for name in stage.inputs]
        if stage.kind == "projection":
            x = inputs[0]
            linear = self.layer.linears[stage.name]
            pair = self.runner.adapter.pair(linear)
            mask = self._mask(linear, pair, x, start)
            scale = self.runner.adapter.scale
            y = projection.forward(self.runner.model, self.runner.plan, linear, _rows(x), pair, scale, mask)
            y = y.reshape(*x.shape[:-1], -1)
        else:
            assert stage.run is not None
            y = stage.run(self.norms, *inputs)
        mx.eval(y)
        return y

    def _backward(
        self, stage: Stage, values: Values, cotangents: Values, wanted: tuple[str, ...], start: int
    ) -> None:
        g = cotangents.pop(stage.output)
        if stage.kind == "projection":
            found = {stage.inputs[0]: self._projection_backward(stage, values, g, bool(wanted), start)}
        else:
            assert stage.vjp is not None
            found = dict(zip(stage.inputs, stage.vjp(self.norms, values, g), strict=True))
        for name in wanted:
            known, cotangent = cotangents.get(name), found[name]
            assert cotangent is not None
            cotangents[name] = cotangent if known is None else known + cotangent
        mx.eval(cotangents)

    def _projection_backward(
        self, stage: Stage, values: Values, g: mx.array, wanted: bool, start: int
    ) -> mx.array | None:
        linear, scale = self.layer.linears[stage.name], self.runner.adapter.scale
        pair = self.runner.adapter.pair(linear)
        mask: mx.array | None = None
        if pair is not None:
            x = values[stage.inputs[0]]
            mask = self._mask(linear, pair, x, start)
            found = projection.pair_gradients(_rows(x), _rows(g), pair, scale, mask)
            for side, gradient in zip("ab", found, strict=True):
                name = f"{linear.name}.lora_{side}"
                known = self.gradients.get(name)
                self.gradients[name] = gradient if known is None else known + gradient
                mx.eval(self.gradients[name])
        if not wanted:
            return None
        dx = projection.input_cotangent(self.runner.model, self.runner.plan, linear, _rows(g), pair, scale, mask)
        return dx.reshape(*g.shape[:-1], linear.in_dims)

    def _mask(self, linear: Linear, pair: Pair | None, x: mx.array, start: int) -> mx.array | None:
        runner = self.runner
        if pair is None or runner.dropout_parts is None:
            return None
        parts: tuple[int | str, ...] = (*runner.dropout_parts, linear.name)
        return dropout_mask(parts, x.shape[0], start, start + x.shape[1], x.shape[2], runner.adapter.dropout, x.dtype)


def _rows(x: mx.array) -> mx.array:
    """[B, T, width] as [B * T, width]."""
    return x.reshape(-1, x.shape[-1])
