"""MeBP: exact LoRA gradients, block by block, with activations in a mapped file.

The forward pass keeps one block's values at a time; what the backward pass needs goes to
the arena. The backward pass visits the blocks in reverse and hands over each block's
gradients as soon as they are complete, before the next block is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..errors import NonFiniteLoss
from ..model.frozen import Model
from ..model.lora import Lora
from . import head
from .arena import Arena
from .block import Adapter, BlockRunner, trained_projections
from .plan import Plan
from .readahead import ReadAhead

Sink = Callable[[dict[str, mx.array]], None]


class Evaluation(NamedTuple):
    """Sum of the labelled tokens' losses, their number, and how many of them are the likeliest token."""

    loss_sum: float
    n_labels: int
    n_correct: int


class TokenBatch(Protocol):
    """What an engine reads of a batch: tokens and targets int32 [B, T], target -100 = no label."""

    @property
    def tokens(self) -> np.ndarray: ...

    @property
    def targets(self) -> np.ndarray: ...


class BackpropEngine:
    """The engine `mebp`. dropout: whether step() applies the Lora's dropout rate."""

    def __init__(
        self,
        model: Model,
        lora: Lora,
        *,
        plan: Plan | None = None,
        seed: int = 0,
        arena_dir: str | Path | None = None,
        dropout: bool = True,
    ):
        self.model, self.lora, self.seed, self.dropout = model, lora, seed, dropout
        self.plan = plan or Plan()
        self.arena_dir = arena_dir
        self.arena: Arena | None = None
        self.ahead = ReadAhead(model)
        # Blocks below the lowest trained one get no gradient: nothing of theirs is saved or visited.
        trained = (layer.index for layer in model.spec.layers if trained_projections(lora, layer))
        self.first_trained = next(trained, model.spec.L)

    def reserve(self, batch_size: int, n_tokens: int) -> None:
        """Make room in the arena for batches of [batch_size, n_tokens]; UserError when the disk has none."""
        spec = self.model.spec
        n_layers = spec.L - self.first_trained
        needed = self.plan.arena_bytes(spec, batch_size, n_tokens, n_layers, self.model.dtype.size)
        if self.arena is None or self.arena.capacity_bytes < needed:
            if self.arena is not None:
                self.arena.close()
            self.arena = Arena(needed, self.arena_dir)

    def step(self, batch: TokenBatch, *, step: int, micro: int, n_labels: int, sink: Sink) -> float:
        """The batch's share of the step's loss, its gradients handed to `sink` block by block, last block first.

        n_labels: labelled tokens of the whole optimizer step, over all its micro-batches, so
        that shares and gradients add up to the token-weighted mean. Raises NonFiniteLoss
        before anything is handed over.
        """
        self.reserve(*batch.tokens.shape)
        assert self.arena is not None
        self.arena.clear()
        dropout_parts = (self.seed, step, micro) if self.dropout else None
        runner = BlockRunner(self.model, self.plan, self.lora, self.arena, dropout_parts)
        x = embed_tiles(self.model, self.plan, batch.tokens)
        for layer in self.model.spec.layers:
            self.ahead.block(layer.index + 1)
            x = runner.forward(layer, x, save=layer.index >= self.first_trained)
        result = head.run(self.model, self.plan, x, batch.targets, want_dx=True, weight=1 / max(n_labels, 1))
        loss = result.loss_sum / max(n_labels, 1)
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"loss is {loss}")
        dx = result.dx
        del result
        for layer in reversed(self.model.spec.layers[self.first_trained :]):
            assert dx is not None
            self.ahead.block(layer.index - 1)
            dx, gradients = runner.backward(layer, dx, want_dx=layer.index > self.first_trained)
            sink(gradients)
            del gradients
        return loss

    def evaluate(self, batch: TokenBatch) -> Evaluation:
        """A forward pass, without dropout."""
        return forward_loss(self.model, self.plan, self.lora, batch, ahead=self.ahead)

    def close(self) -> None:
        """Give the arena's file back, and the thread."""
        self.ahead.close()
        if self.arena is not None:
            self.arena.close()
            self.arena = None


def embed_tiles(model: Model, plan: Plan, tokens: np.ndarray) -> list[mx.array]:
    """Embeddings of tokens [B, T] as the plan's tiles [B, tile, D]."""
    tiles = [model.embed(tokens[:, start:stop]) for start, stop in plan.tiles(tokens.shape[1])]
    mx.eval(tiles)
    return tiles


def forward_loss(
    model: Model,
    plan: Plan,
    adapter: Adapter,
    batch: TokenBatch,
    dropout_parts: tuple[int, ...] | None = None,
    ahead: ReadAhead | None = None,
) -> Evaluation:
    """A forward pass with nothing saved."""
    runner = BlockRunner(model, plan, adapter, dropout_parts=dropout_parts)
    x = embed_tiles(model, plan, batch.tokens)
    for layer in model.spec.layers:
        if ahead is not None:
            ahead.block(layer.index + 1)
        x = runner.forward(layer, x, save=False)
    result = head.run(model, plan, x, batch.targets, want_dx=False)
    return Evaluation(result.loss_sum, result.n_labels, result.n_correct)
