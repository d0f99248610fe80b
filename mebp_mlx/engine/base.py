"""What all engines share: what they read of a batch, what they give back, and the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..families import block_class
from ..families.base import BlockRun, Kept
from ..model.base import Model
from ..model.config import Layer
from ..model.lora import Adapter
from ..model.prefetch import Prefetch
from ..ops.cross_entropy import cross_entropy
from ..ops.plan import Barrier, Context, Plan

# Takes a block's gradients, float32 by parameter name; gives back what has to be evaluated with the block.
Sink = Callable[[dict[str, mx.array]], "list[mx.array] | None"]


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


class Engine(Protocol):
    """What the trainer asks of an engine."""

    def reserve(self, batch_size: int, n_tokens: int) -> None: ...

    def step(self, batch: TokenBatch, *, step: int, micro: int, n_labels: int, sink: Sink) -> float: ...

    def evaluate(self, batch: TokenBatch) -> Evaluation: ...

    def close(self) -> None: ...


class Pass(Context):
    """A model on its way over one batch: blocks forward and the head. ahead: reads the next block's pages meanwhile."""

    def __init__(
        self,
        model: Model,
        plan: Plan,
        adapter: Adapter,
        barrier: Barrier | None = None,
        dropout_parts: tuple[int, ...] | None = None,
        ahead: Prefetch | None = None,
    ):
        super().__init__(model, plan, adapter, barrier, dropout_parts)
        self.ahead, self.block = ahead, block_class(model.spec)

    def embed(self, tokens: np.ndarray) -> list[mx.array]:
        """Embeddings of tokens [B, T] as the plan's tiles [B, tile, D]."""
        tiles = [self.model.embed(tokens[:, start:stop]) for start, stop in self.plan.tiles(tokens.shape[1])]
        self.barrier.value(*tiles)
        return tiles

    def run(self, layer: Layer, kept: Kept | None = None, names: frozenset[str] | None = frozenset()) -> BlockRun:
        """One block at work; kept, names: where and which values are kept, as of BlockRun."""
        return BlockRun(self, layer, self.block.gate, kept, names)

    def forward(
        self, layer: Layer, x: list[mx.array], kept: Kept | None = None, names: frozenset[str] = frozenset()
    ) -> list[mx.array]:
        """Tiles [B, tile, D] of a block's input (emptied) -> tiles of its output."""
        if self.ahead is not None:
            self.ahead.block(layer.index + 1)
        run, y, position = self.run(layer, kept, names), [], 0
        for _ in range(len(x)):
            block = self.block(run, position, x[0].shape[:2], x.pop(0))
            position += block.shape[1]
            y.append(block.y)
            del block  # what is not kept is only the graph's from here on
            run.shared.clear()
            self.barrier.tile(y[-1])
        self.barrier.block()
        return y

    def loss(self, batch: TokenBatch) -> Evaluation:
        """The whole forward pass, with nothing kept."""
        x = self.embed(batch.tokens)
        for layer in self.model.spec.layers:
            x = self.forward(layer, x)
        loss_sum, n_labels, n_correct, _ = cross_entropy(self, x, batch.targets, need_dx=False)
        self.barrier.finish()
        return Evaluation(loss_sum, n_labels, n_correct)
