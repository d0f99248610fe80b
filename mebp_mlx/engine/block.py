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
from .mlp import BlockwiseMlp
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


def trained_projections(adapter: Adapter, layer: Layer) -> frozenset[str]:
    """The short names of the projections of a block that have a pair."""
    return frozenset(short for short, linear in layer.linears.items() if adapter.trains(linear))


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
            work.carry_out(after, values, tile, starts[tile], save=save)
            y.append(values[OUTPUT])
        return y

    def backward(self, layer: Layer, dy: Tiles, want_dx: bool) -> tuple[Tiles, dict[str, mx.array]]:
        """Tiles of dL/dy -> (tiles of dL/dx, or none unless wanted; LoRA gradients by parameter name, float32)."""
        trained = trained_projections(self.adapter, layer)
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
        save: bool = False,
    ) -> None:
        """Carry out the operations on one tile, whose first position is `start`.

        save: what is inside a stage goes to the arena too, where the policy says so.
        """
        for op in ops:
            if op.kind == "drop":
                values.pop(op.value, None)
            elif op.kind == "save":
                self.save(op.value, tile, values[op.value])
            elif op.kind == "load":
                values[op.value] = self.fetch(op.value, tile, start)
            elif op.kind == "run":
                assert op.stage is not None
                values[op.stage.output] = self._forward(op.stage, values, tile, start, save)
            else:
                assert op.stage is not None and cotangents is not None
                self._backward(op.stage, values, cotangents, op.wanted, tile, start)

    def save(self, name: str, tile: int, value: mx.array) -> None:
        assert self.runner.arena is not None
        self.runner.arena.put(self.layer.index, name, tile, value)

    def fetch(self, name: str, tile: int, start: int) -> mx.array:
        """A tile of a value: from the arena if it is saved, computed again otherwise."""
        if name.partition(".")[0] in self.runner.saved or name == INPUT:
            assert self.runner.arena is not None
            return self.runner.arena.get(self.layer.index, name, tile)
        if name == "a":
            return self.attention.forward(self.fetch("q", tile, start), start)
        values: Values = {INPUT: self.fetch(INPUT, tile, start)}
        needed = [stage for stage in self.runner.before if stage.output in (name, "h")]
        self.carry_out(forward_ops(tuple(needed), frozenset(), keep=(name,)), values, tile, start)
        return values[name]

    def _forward(self, stage: Stage, values: Values, tile: int, start: int, save: bool) -> mx.array:
        inputs = [values[name] for name in stage.inputs]
        runner = self.runner
        if stage.kind == "projection":
            y = projection.forward(runner.model, runner.plan, self._stream(stage, inputs[0], start))
            y = y.reshape(*inputs[0].shape[:-1], -1)
        elif stage.kind == "mlp":

            def keep(name: str, block: int, value: mx.array) -> None:
                if save and name in runner.saved:
                    self.save(f"{name}.{block}", tile, value)

            y = self._mlp(stage, inputs[0], start).forward(keep).reshape(inputs[0].shape)
        else:
            assert stage.run is not None
            y = stage.run(self.norms, *inputs)
        mx.eval(y)
        return y

    def _backward(
        self, stage: Stage, values: Values, cotangents: Values, wanted: tuple[str, ...], tile: int, start: int
    ) -> None:
        g = cotangents.pop(stage.output)
        runner = self.runner
        found: dict[str, mx.array | None]
        if stage.vjp is not None:
            found = dict(zip(stage.inputs, stage.vjp(self.norms, values, g), strict=True))
        else:
            source = stage.inputs[0]
            x = values.get(source)
            if stage.kind == "mlp":
                assert x is not None

                def load(name: str, block: int) -> mx.array | None:
                    return self.fetch(f"{name}.{block}", tile, start) if name in runner.saved else None

                dx, pairs = self._mlp(stage, x, start).backward(_rows(g), load, bool(wanted))
            else:
                dx, pair = projection.backward(
                    runner.model, runner.plan, self._stream(stage, x, start), _rows(g), bool(wanted)
                )
                pairs = {} if pair is None else {stage.name: pair}
            for name, pair in pairs.items():
                self._add_gradients(self.layer.linears[name], pair)
            found = {source: None if dx is None else dx.reshape(*g.shape[:-1], -1)}
        for name in wanted:
            known, cotangent = cotangents.get(name), found[name]
            assert cotangent is not None
            cotangents[name] = cotangent if known is None else known + cotangent
        mx.eval(cotangents)

    def _stream(self, stage: Stage, x: mx.array | None, start: int) -> projection.RowStream:
        """A projection on a tile; x may be missing where there is no pair, for a backward that needs no value."""
        linear, adapter = self.layer.linears[stage.name], self.runner.adapter
        pair = adapter.pair(linear)
        if x is None:
            assert pair is None
            return projection.RowStream(self.runner.model, linear, None, None, adapter.scale, None)
        mask = self._mask(linear, x, start, 0, linear.in_dims)
        return projection.RowStream(self.runner.model, linear, _rows(x), pair, adapter.scale, mask)

    def _mlp(self, stage: Stage, x: mx.array, start: int) -> BlockwiseMlp:
        runner, layer = self.runner, self.layer
        assert stage.run is not None
        pairs = {name: runner.adapter.pair(layer.linears[name]) for name in stage.linears}

        def mask(linear: Linear, first: int, last: int) -> mx.array | None:
            return self._mask(linear, x, start, first, last)

        return BlockwiseMlp(runner.model, runner.plan, layer, stage.run, _rows(x), pairs, runner.adapter.scale, mask)

    def _add_gradients(self, linear: Linear, pair: Pair) -> None:
        for side, gradient in zip("ab", pair, strict=True):
            name = f"{linear.name}.lora_{side}"
            known = self.gradients.get(name)
            self.gradients[name] = gradient if known is None else known + gradient
            mx.eval(self.gradients[name])

    def _mask(self, linear: Linear, x: mx.array, start: int, first: int, last: int) -> mx.array | None:
        """Dropout's factor on the columns [first, last) of a linear's input, for x's rows."""
        runner = self.runner
        if runner.dropout_parts is None or not runner.adapter.trains(linear):
            return None
        parts: tuple[int | str, ...] = (*runner.dropout_parts, linear.name)
        B, T = x.shape[:2]
        return dropout_mask(parts, B, (start, start + T), (first, last), runner.adapter.dropout, x.dtype)


def _rows(x: mx.array) -> mx.array:
    """[B, T, width] as [B * T, width]."""
    return x.reshape(-1, x.shape[-1])
