"""The baseline and the oracle: MLX's own autograd over the whole model, with mx.checkpoint per block.

Shares the stages' functions with the streaming engine, and none of its backward code, its
schedule, its one-pass head or its blocks.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import NonFiniteLoss
from ..model.attention import attention
from ..model.decoder import INPUT, OUTPUT, block_stages
from ..model.frozen import Model
from ..model.lora import Lora, dropout_mask
from ..model.spec import Layer, Linear
from .backprop import Evaluation, Sink, TokenBatch


class WholeGraphEngine:
    """The engine `whole-graph`. Packed weights stay in memory; whether a product decompresses them is the model's.

    last_block_first: evaluate gradients from the last block to the first (the order that
    lets checkpointing free memory early); False evaluates them all at once.
    """

    def __init__(
        self, model: Model, lora: Lora, *, seed: int = 0, checkpoint: bool = True, last_block_first: bool = True
    ):
        self.model, self.lora, self.seed = model, lora, seed
        self.checkpoint, self.last_block_first = checkpoint, last_block_first
        self.stages = block_stages(model.spec)

    def reserve(self, batch_size: int, n_tokens: int) -> None:
        """Nothing to make room for: the graph lives in memory."""

    def step(self, batch: TokenBatch, *, step: int, micro: int, n_labels: int, sink: Sink) -> float:
        """As BackpropEngine.step: the batch's share of the loss, gradients handed over block by block."""
        parameters = self.lora.parameters()

        def loss_fn(parameters: dict[str, mx.array]) -> mx.array:
            return self._loss_sum(parameters, batch, (self.seed, step, micro)) / max(n_labels, 1)

        loss, gradients = mx.value_and_grad(loss_fn)(parameters)
        loss_value = float(np.asarray(loss))
        if not math.isfinite(loss_value):
            raise NonFiniteLoss(f"loss is {loss_value}")
        if not self.last_block_first:
            mx.eval(gradients)
        for layer in reversed(self.model.spec.layers):
            own = {name: g for name, g in gradients.items() if name.startswith(f"{layer.prefix}.")}
            mx.eval(own)
            if own:
                sink(own)
        return loss_value

    def evaluate(self, batch: TokenBatch) -> Evaluation:
        """A forward pass, without dropout."""
        logits = self._logits(self.lora.parameters(), batch, None)
        mask, labels = batch.targets != -100, mx.array(batch.targets)
        n_correct = (mx.where(mx.array(mask), mx.argmax(logits, axis=-1) == labels, False)).sum()
        loss_sum = _masked_loss_sum(logits, batch.targets)
        return Evaluation(float(np.asarray(loss_sum)), int(mask.sum()), int(np.asarray(n_correct)))

    def close(self) -> None:
        """Nothing is held."""

    def _loss_sum(
        self, parameters: dict[str, mx.array], batch: TokenBatch, dropout_parts: tuple[int, ...] | None
    ) -> mx.array:
        return _masked_loss_sum(self._logits(parameters, batch, dropout_parts), batch.targets)

    def _logits(
        self, parameters: dict[str, mx.array], batch: TokenBatch, dropout_parts: tuple[int, ...] | None
    ) -> mx.array:
        model = self.model
        x = model.embed(batch.tokens)
        for layer in model.spec.layers:
            own = {name: p for name, p in parameters.items() if name.startswith(f"{layer.prefix}.")}

            def block(x: mx.array, own: dict[str, mx.array], layer: Layer = layer) -> mx.array:
                return self._block(layer, x, own, dropout_parts)

            # Trainables go in as arguments: a captured one would get a silent zero gradient.
            x = (mx.checkpoint(block) if self.checkpoint else block)(x, own)
        h = mx.fast.rms_norm(x, model.norm(model.spec.final_norm), model.spec.norm_eps)
        logits = self._linear(model.spec.head, h)
        return logits.astype(mx.float32) if logits.dtype.size < 4 else logits

    def _linear(self, linear: Linear, x: mx.array) -> mx.array:
        y = self.model.piece_of_rows(linear, 0, linear.out_dims).forward(x)
        bias = self.model.bias(linear, 0, linear.out_dims)
        return y if bias is None else y + bias

    def _block(
        self, layer: Layer, x: mx.array, own: dict[str, mx.array], dropout_parts: tuple[int, ...] | None
    ) -> mx.array:
        norms = self.model.norms(layer)
        values: dict[str, Any] = {INPUT: x}
        for stage in self.stages:
            inputs = [values[name] for name in stage.inputs]
            if stage.kind == "projection":
                y = self._projection(layer.linears[stage.name], inputs[0], own, dropout_parts)
            elif stage.kind == "mlp":
                assert stage.run is not None
                g, u = (self._projection(layer.linears[n], inputs[0], own, dropout_parts) for n in ("gate", "up"))
                y = self._projection(layer.linears["down"], stage.run(g, u), own, dropout_parts)
            elif stage.kind == "attention":
                y = attention(self.model.spec, layer, norms, *inputs)
            else:
                assert stage.run is not None
                y = stage.run(norms, *inputs)
            values[stage.output] = y
        return values[OUTPUT]

    def _projection(
        self, linear: Linear, x: mx.array, own: dict[str, mx.array], dropout_parts: tuple[int, ...] | None
    ) -> mx.array:
        y = self._linear(linear, x)
        a = own.get(f"{linear.name}.lora_a")
        if a is None:
            return y
        if self.lora.dropout > 0 and dropout_parts is not None:
            parts: tuple[int | str, ...] = (*dropout_parts, linear.name)
            B, T, width = x.shape
            mask = dropout_mask(parts, B, (0, T), (0, width), self.lora.dropout, x.dtype)
            x = x * mask.reshape(x.shape)
        return y + (self.lora.scale * ((x @ a) @ own[f"{linear.name}.lora_b"])).astype(y.dtype)


def _masked_loss_sum(logits: mx.array, targets: np.ndarray) -> mx.array:
    mask = targets != -100
    losses = nn.losses.cross_entropy(logits, mx.array(np.where(mask, targets, 0)))
    return mx.where(mx.array(mask), losses, 0).sum()
