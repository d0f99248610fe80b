"""The baseline and test oracle: MLX's own autograd over the whole model, with mx.checkpoint per block.

It shares the block equations with the streaming engine, but not the backward code, one-pass head, tiles or weight
blocks.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from ..errors import NonFiniteLoss
from ..kernels import cpu
from ..model import NO_LABEL
from ..model.base import Model
from ..model.config import Layer, Linear
from ..model.lora import Adapter, Lora, pairs_of
from ..ops.cross_entropy import capped, final_norm
from ..ops.plan import Barrier, Plan
from .base import Evaluation, Pass, Sink, TokenBatch, first_row, hand_over_zeros
from .shared_keys import Pair

_RUN = 128  # terms summed sequentially


class WholeGraphEngine:
    """The engine `whole-graph`. Packed weights stay in memory; the model decides whether a product decompresses them.

    last_block_first: evaluate gradients from the last block to the first, so that checkpointing frees memory early;
    False evaluates them all at once.
    """

    def __init__(
        self, model: Model, lora: Lora, *, seed: int = 0, checkpoint: bool = True, last_block_first: bool = True
    ):
        self.model, self.lora, self.seed = model, lora, seed
        self.checkpoint, self.last_block_first = checkpoint, last_block_first

    def reserve(self, batch_size: int, n_tokens: int) -> None:
        """Nothing to reserve: the graph is in memory."""

    def step(self, batch: TokenBatch, *, step: int, micro: int, n_labels: int, sink: Sink) -> float:
        """As BackpropEngine.step: returns the batch's share of the loss, passes gradients on block by block."""
        if not batch.tokens.size:
            hand_over_zeros(self.lora, self.model.spec.layers, sink)
            return 0.0
        parameters = self.lora.parameters()

        def loss_fn(parameters: dict[str, mx.array]) -> mx.array:
            logits = self._logits(parameters, batch, (first_row(batch), self.seed, step, micro))
            return _masked_loss_sum(logits, batch.targets) / max(n_labels, 1)

        with cpu.off():
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
                mx.eval(sink(own) or [])
        return loss_value

    def evaluate(self, batch: TokenBatch) -> Evaluation:
        """A forward pass, without dropout."""
        if not batch.tokens.size:
            return Evaluation(0.0, 0, 0)
        with cpu.off():
            logits = self._logits(self.lora.parameters(), batch, None)
        mask, labels = batch.targets != NO_LABEL, mx.array(batch.targets)
        n_correct = (mx.where(mx.array(mask), mx.argmax(logits, axis=-1) == labels, False)).sum()
        loss_sum = _masked_loss_sum(logits, batch.targets)
        return Evaluation(float(np.asarray(loss_sum)), int(mask.sum()), int(np.asarray(n_correct)))

    def close(self) -> None:
        """Nothing to free."""

    def _logits(
        self, parameters: dict[str, mx.array], batch: TokenBatch, dropout_parts: tuple[int, ...] | None
    ) -> mx.array:
        model, T = self.model, batch.tokens.shape[1]
        plan = Plan(weight_block_bytes=None, token_block=T + 64, query_block=T)
        x = model.embed(batch.tokens)
        shared: dict[int, Pair] = {}
        for layer in model.spec.layers:
            own = {name: p for name, p in parameters.items() if name.startswith(f"{layer.prefix}.")}

            def block(
                x: mx.array, own: dict[str, mx.array], shared: dict[int, Pair], layer: Layer = layer
            ) -> tuple[mx.array, dict[int, Pair]]:
                adapter = Adapter(pairs_of(own), self.lora.scale, self.lora.dropout)
                work = Pass(model, plan, adapter, Barrier(None), dropout_parts)
                work.tokens, work.shared.pairs = batch.tokens, dict(shared)
                return work.forward(layer, [x])[0], work.shared.pairs

            # Trainables and shared keys are arguments: captured arrays would silently get zero gradients.
            x, shared = (mx.checkpoint(block) if self.checkpoint else block)(x, own, shared)
        logits = capped(self._linear(model.spec.head, final_norm(model)(x)), model.spec.logit_cap)
        return logits.astype(mx.float32) if logits.dtype.size < 4 else logits

    def _linear(self, linear: Linear, x: mx.array) -> mx.array:
        return self.model.row_block(linear, 0, linear.out_dims).matmul(x)


def _masked_loss_sum(logits: mx.array, targets: np.ndarray) -> mx.array:
    mask = targets != NO_LABEL
    labels = mx.array(np.where(mask, targets, 0))
    picked = mx.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return mx.where(mx.array(mask), log_sum_exp(logits) - picked, 0).sum()


def log_sum_exp(x: mx.array) -> mx.array:
    """log sum exp over the last axis, summed in runs of 128 and then over the runs.

    MLX's logsumexp adds sequentially on the CPU, so its error grows with the vocabulary.
    """
    highest = mx.stop_gradient(x.max(axis=-1, keepdims=True))
    terms = mx.exp(x - highest)
    terms = mx.pad(terms, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % _RUN)])
    return highest[..., 0] + mx.log(terms.reshape(*x.shape[:-1], -1, _RUN).sum(axis=-1).sum(axis=-1))
