"""Carries out a block's operations: one stage at a time, each evaluated before the next begins."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from ..model.attention import attend, key_range, split_heads
from ..model.decoder import INPUT, OUTPUT, Stage, block_stages
from ..model.frozen import Model
from ..model.lora import Pair, dropout_mask, random_key
from ..model.spec import Layer, Linear
from . import projection
from .arena import Arena
from .plan import Plan
from .schedule import Op, backward_ops, forward_ops, needs_gradient

Values = dict[str, mx.array]


class Adapter(Protocol):
    """What a block needs to know of the trainable parameters; Lora is one, a perturbed Lora another."""

    scale: float
    dropout: float

    def pair(self, linear: Linear) -> Pair | None: ...

    def trains(self, linear: Linear) -> bool: ...


class BlockRunner:
    """Runs blocks of one model forward and backward.

    adapter: the trainable pairs; arena: where saved values go (None for forward-only use);
    dropout_parts: what dropout's random keys are made of besides layer and projection
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
        self.saved = plan.saved_for(model.spec)

    def trained(self, layer: Layer) -> frozenset[str]:
        """The short names of the projections of a block that have a pair."""
        return frozenset(short for short, linear in layer.linears.items() if self.adapter.trains(linear))

    def forward(self, layer: Layer, x: mx.array, save: bool) -> mx.array:
        """x [B, T, D] -> y [B, T, D]; with `save`, what the backward needs goes to the arena."""
        run = _Run(self, layer)
        run.values[INPUT] = x
        for op in forward_ops(self.stages, self.saved if save else frozenset()):
            run.do(op)
        return run.values[OUTPUT]

    def backward(self, layer: Layer, dy: mx.array, want_dx: bool) -> tuple[mx.array | None, dict[str, mx.array]]:
        """dy [B, T, D] -> (dx or None, the block's LoRA gradients by parameter name, float32)."""
        trained = self.trained(layer)
        run = _Run(self, layer)
        run.cotangents[OUTPUT] = dy
        run.useful = needs_gradient(self.stages, trained, want_dx)
        for op in backward_ops(self.stages, self.saved, trained, want_dx):
            run.do(op)
        return run.cotangents.get(INPUT), run.gradients


class _Run:
    """The values, cotangents and gradients of one block while its operations are carried out."""

    def __init__(self, runner: BlockRunner, layer: Layer):
        self.runner, self.layer = runner, layer
        self.norms = runner.model.norms(layer)
        self.values: Values = {}
        self.cotangents: Values = {}
        self.gradients: dict[str, mx.array] = {}
        self.useful: dict[str, bool] = {}

    def do(self, op: Op) -> None:
        if op.kind == "run":
            assert op.stage is not None
            self.values[op.stage.output] = self._forward(op.stage)
        elif op.kind == "backward":
            assert op.stage is not None
            self._backward(op.stage, op.wanted)
        elif op.kind == "drop":
            self.values.pop(op.value, None)
        else:
            arena = self.runner.arena
            assert arena is not None
            if op.kind == "save":
                arena.put(self.layer.index, op.value, self.values[op.value])
            else:
                self.values[op.value] = arena.get(self.layer.index, op.value)

    def _forward(self, stage: Stage) -> mx.array:
        inputs = [self.values[name] for name in stage.inputs]
        if stage.kind == "projection":
            x = inputs[0]
            linear = self.layer.linears[stage.name]
            pair, mask = self._pair_and_mask(stage, x)
            y = projection.forward(
                self.runner.model, self.runner.plan, linear, _rows(x), pair, self.runner.adapter.scale, mask
            )
            y = y.reshape(*x.shape[:-1], -1)
        elif stage.kind == "attention":
            y = self._attention(*inputs)
        else:
            assert stage.run is not None
            y = stage.run(self.norms, *inputs)
        mx.eval(y)
        return y

    def _backward(self, stage: Stage, wanted: tuple[str, ...]) -> None:
        g = self.cotangents.pop(stage.output)
        if stage.kind == "projection":
            self._projection_backward(stage, g, wanted)
        elif stage.kind == "attention":
            self._attention_backward(stage, g, wanted)
        else:
            assert stage.vjp is not None
            for name, cotangent in zip(stage.inputs, stage.vjp(self.norms, self.values, g), strict=True):
                if name in wanted:
                    self._add(name, cotangent)
        mx.eval(self.cotangents)

    def _add(self, name: str, cotangent: mx.array) -> None:
        known = self.cotangents.get(name)
        self.cotangents[name] = cotangent if known is None else known + cotangent

    def _pair_and_mask(self, stage: Stage, x: mx.array) -> tuple[Pair | None, mx.array | None]:
        linear = self.layer.linears[stage.name]
        runner = self.runner
        pair = runner.adapter.pair(linear)
        if pair is None or runner.dropout_parts is None:
            return pair, None
        key = random_key("dropout", *runner.dropout_parts, linear.name)
        return pair, dropout_mask(key, _rows(x).shape, runner.adapter.dropout, x.dtype)

    def _projection_backward(self, stage: Stage, g: mx.array, wanted: tuple[str, ...]) -> None:
        linear = self.layer.linears[stage.name]
        scale = self.runner.adapter.scale
        source = stage.inputs[0]
        x = self.values.get(source)
        shape = (*g.shape[:-1], linear.in_dims)
        pair, mask = self._pair_and_mask(stage, g if x is None else x) if x is not None else (None, None)
        if pair is not None and x is not None:
            gradients = projection.pair_gradients(_rows(x), _rows(g), pair, scale, mask)
            mx.eval(gradients)
            self.gradients[f"{linear.name}.lora_a"], self.gradients[f"{linear.name}.lora_b"] = gradients
        if wanted:
            dx = projection.input_cotangent(self.runner.model, self.runner.plan, linear, _rows(g), pair, scale, mask)
            self._add(source, dx.reshape(shape))

    def _attention(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        spec, layer = self.runner.model.spec, self.layer
        keys = split_heads(spec, layer, k, self.norms.get("k_norm"), 0)
        values = split_heads(spec, layer, v, None, 0, rotate=False)
        pieces = []
        for start, stop in self._query_blocks(q.shape[1]):
            queries = split_heads(spec, layer, q[:, start:stop], self.norms.get("q_norm"), start)
            first, last = key_range(layer, start, stop)
            piece = attend(spec, layer, queries, keys[:, :, first:last], values[:, :, first:last], start, first)
            mx.eval(piece)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=1)

    def _attention_backward(self, stage: Stage, g: mx.array, wanted: tuple[str, ...]) -> None:
        spec, layer = self.runner.model.spec, self.layer
        q, k, v = (self.values[name] for name in stage.inputs)

        def rotated_keys(k: mx.array) -> mx.array:
            return split_heads(spec, layer, k, self.norms.get("k_norm"), 0)

        keys = rotated_keys(k)
        values = split_heads(spec, layer, v, None, 0, rotate=False)
        d_queries, d_keys, d_values = [], mx.zeros_like(keys), mx.zeros_like(values)
        for start, stop in self._query_blocks(q.shape[1]):
            first, last = key_range(layer, start, stop)

            def block(
                q: mx.array, keys: mx.array, values: mx.array, start: int = start, first: int = first
            ) -> mx.array:
                queries = split_heads(spec, layer, q, self.norms.get("q_norm"), start)
                return attend(spec, layer, queries, keys, values, start, first)

            inputs = [q[:, start:stop], keys[:, :, first:last], values[:, :, first:last]]
            dq, dk, dv = mx.vjp(block, inputs, [g[:, start:stop]])[1]
            d_keys = d_keys.at[:, :, first:last].add(dk)
            d_values = d_values.at[:, :, first:last].add(dv)
            mx.eval(dq, d_keys, d_values)
            d_queries.append(dq)
        (dk,) = mx.vjp(rotated_keys, [k], [d_keys])[1]
        found = {
            "q": d_queries[0] if len(d_queries) == 1 else mx.concatenate(d_queries, axis=1),
            "k": dk,
            "v": d_values.transpose(0, 2, 1, 3).reshape(v.shape),
        }
        for name in wanted:
            self._add(name, found[name])

    def _query_blocks(self, T: int) -> list[tuple[int, int]]:
        step = self.runner.plan.query_block
        return [(start, min(start + step, T)) for start in range(0, T, step)]


def _rows(x: mx.array) -> mx.array:
    """[B, T, width] as [B * T, width]."""
    return x.reshape(-1, x.shape[-1])
