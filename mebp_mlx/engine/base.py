"""Shared by all engines: batches, results, the forward pass and the store of kept values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..families import BLOCKS
from ..families.base import BlockRun, Kept
from ..model import NO_LABEL
from ..model.config import Layer
from ..model.lora import Lora
from ..ops.cross_entropy import cross_entropy
from ..ops.plan import Barrier, Context
from ..system.pages import PAGE_BYTES
from .arena import Arena
from .shared_keys import SharedKeys

# Takes a block's gradients, float32 by parameter name; returns the arrays to evaluate with the block.
Sink = Callable[[dict[str, mx.array]], "list[mx.array] | None"]

Key = tuple[int, str, int]  # layer, name, tile


class Evaluation(NamedTuple):
    """Sum of the labelled tokens' losses, their number, and the number whose label is the most likely token."""

    loss_sum: float
    n_labels: int
    n_correct: int


class TokenBatch(Protocol):
    """The parts of a batch that an engine reads: tokens and targets int32 [B, T], target -100 = no label.

    n_labels: labelled tokens; if the batch is part of a micro-batch, those of the whole micro-batch.
    """

    @property
    def tokens(self) -> np.ndarray: ...

    @property
    def targets(self) -> np.ndarray: ...

    @property
    def n_labels(self) -> int: ...


class WholeBatch(NamedTuple):
    """A whole micro-batch: tokens and targets int32 [B, T]."""

    tokens: np.ndarray
    targets: np.ndarray

    @property
    def n_labels(self) -> int:
        """Labelled tokens."""
        return int((self.targets != NO_LABEL).sum())


def first_row(batch: TokenBatch) -> int:
    """Index of the batch's first row in its micro-batch; 0 if the batch is a whole micro-batch."""
    return getattr(batch, "first_row", 0)


def hand_over_zeros(lora: Lora, layers: Sequence[Layer], sink: Sink) -> None:
    """Passes zero gradients to `sink`, last block first: the batch has no rows, but other machines wait for sums."""
    parameters = lora.parameters()
    for layer in reversed(layers):
        zeros = {n: mx.zeros(p.shape) for n, p in parameters.items() if n.startswith(f"{layer.prefix}.")}
        mx.eval(sink(zeros) or [] if zeros else [])


class Engine(Protocol):
    """The interface that the trainer uses. A batch may be this machine's part of a micro-batch, even an empty one."""

    def reserve(self, batch_size: int, n_tokens: int) -> None: ...

    def step(self, batch: TokenBatch, *, step: int, micro: int, n_labels: int, sink: Sink) -> float: ...

    def evaluate(self, batch: TokenBatch) -> Evaluation: ...

    def close(self) -> None: ...


class Pass(Context):
    """The forward pass of a model over one batch: blocks and head."""

    T: int | None = None  # row length, if forward() gets only some tiles of the row

    @cached_property
    def shared(self) -> SharedKeys:
        """Keys and values that several layers attend to."""
        return SharedKeys(self.model.spec.layers, self.adapter)

    @cached_property
    def left_out(self) -> dict[int, dict[str, tuple[tuple[int, ...], mx.Dtype]]]:
        """For memory probes: shapes and dtypes that a skipped tile of a long row keeps, by layer and name."""
        return {}

    def runs(self, layer: Layer, tile: int, n_tiles: int) -> bool:
        """Whether to run a tile. A probe runs only the first and the last three, which need the most memory."""
        return layer.index not in self.left_out or tile == 0 or tile >= n_tiles - 3

    def embed(self, tokens: np.ndarray) -> list[mx.array]:
        """Embeddings of tokens [B, T] as the plan's tiles [B, tile, D]."""
        self.tokens = tokens
        tiles = [self.model.embed(tokens[:, start:stop]) for start, stop in self.plan.tiles(tokens.shape[1])]
        self.barrier.value(*tiles)
        return tiles

    def run(self, layer: Layer, kept: Kept | None = None, names: frozenset[str] | None = frozenset()) -> BlockRun:
        """A run of one block. kept, names: where and which values are kept, as for BlockRun."""
        run = BlockRun(self, layer, BLOCKS[layer.block], kept, names)
        self.shared.lend(layer, run.attention, backward=names is None)
        return run

    def assume(self, B: int, T: int) -> None:
        """Stand-ins for tokens [B, T] and for other blocks' keys and values, to run single blocks."""
        self.tokens = np.zeros((B, T), np.int32)
        self.shared.assume(self.model, B, T)

    def forward(
        self, layer: Layer, x: list[mx.array], kept: Kept | None = None, names: frozenset[str] = frozenset()
    ) -> list[mx.array]:
        """Tiles [B, tile, D] of a block's input (the list is emptied) -> tiles of its output."""
        if self.ahead is not None:
            self.ahead.block(layer.index + 1)
        run, y, position = self.run(layer, kept, names), [], 0
        run.begin(self.T or sum(tile.shape[1] for tile in x))
        n_tiles = len(x)
        for tile in range(n_tiles):
            block = run.block(run, position, x[0].shape[:2], x.pop(0))
            position += block.shape[1]
            y.append(block.y if self.runs(layer, tile, n_tiles) else block.left_out(self.left_out[layer.index]))
            del block  # from here on, only the graph refers to values that are not kept
            run.shared.clear()
            self.barrier.tile(y[-1], *run.carried.values())
        self.shared.take(layer, run.attention)
        self.barrier.block()
        return y

    def loss(self, batch: TokenBatch) -> Evaluation:
        """The whole forward pass, with nothing kept."""
        if not batch.tokens.size:
            return Evaluation(0.0, 0, 0)
        x = self.embed(batch.tokens)
        for layer in self.model.spec.layers:
            x = self.forward(layer, x)
        loss_sum, n_labels, n_correct, _ = cross_entropy(self, x, batch.targets, need_dx=False)
        self.barrier.finish()
        return Evaluation(loss_sum, n_labels, n_correct)


class Store:
    """Values kept between forward and backward (families/base.py: Kept): in memory while there is room, else in a file.

    A value bound for the file is written once it is computed: immediately in eager grains, otherwise one block later,
    while the GPU computes the next block.

    memory_bytes: limit of values in memory, None: no limit; folder: holds the file.
    """

    def __init__(self, barrier: Barrier, memory_bytes: int | None, folder: str | Path | None = None):
        self.barrier, self.memory_bytes, self.folder = barrier, memory_bytes, folder
        self.arena: Arena | None = None
        self.written_bytes, self.read_bytes = 0, 0  # file traffic since clear()
        self.held_bytes = 0  # in memory
        self._arrays: dict[Key, mx.array] = {}
        self._behind: list[Key] = []  # to write once their block is computed
        self._new: list[Key] = []

    def reserve(self, n_bytes: int, block_bytes: int) -> None:
        """Reserves space for all blocks' values, in whole pages; block_bytes: the most of any block. Raises UserError
        if the disk has no room for the values that do not fit in memory.
        """
        if self.memory_bytes is None or n_bytes <= self.memory_bytes:
            return
        # When a value first does not fit in memory, less than one block's size is left unused.
        needed = min(n_bytes, n_bytes - self.memory_bytes + block_bytes)
        if self.arena is None or self.arena.capacity_bytes < needed:
            if self.arena is not None:
                self.arena.close()
            self.arena = Arena(needed, self.folder)

    def clear(self) -> None:
        """Drops all values."""
        self._arrays.clear()
        self._behind, self._new = [], []
        self.held_bytes = self.written_bytes = self.read_bytes = 0
        if self.arena is not None:
            self.arena.clear()

    def put(self, layer: int, name: str, tile: int, value: mx.array) -> bool:
        """Keeps a value; returns whether its array stays in memory."""
        key, n_bytes = (layer, name, tile), -(-value.nbytes // PAGE_BYTES) * PAGE_BYTES  # in whole pages
        if self.memory_bytes is None or self.held_bytes + n_bytes <= self.memory_bytes:
            self.held_bytes += n_bytes
            self._arrays[key] = value
            return True
        if self.barrier.is_lazy:
            self._arrays[key] = value
            self._new.append(key)
            return True
        self._write(key, value)
        return False

    def write_behind(self) -> None:
        """Writes the previous block's values; call it once they are computed."""
        for key in self._behind:
            self._write(key, self._arrays.pop(key))
        self._behind, self._new = self._new, []

    def get(self, layer: int, name: str, tile: int) -> mx.array | None:
        """A kept value, or None."""
        key = (layer, name, tile)
        value = self._arrays.get(key)
        if value is None and self.arena is not None and key in self.arena:
            value = self.arena.get(*key)
            self.read_bytes += value.nbytes
        return value

    def take(self, layer: int, name: str, tile: int) -> mx.array | None:
        """Removes and returns a kept value; the caller holds the only reference."""
        value = self.get(layer, name, tile)
        self._arrays.pop((layer, name, tile), None)
        return value

    def forget(self, layer: int) -> None:
        """Drops a block's values in memory: its backward is done."""
        for key in [key for key in self._arrays if key[0] == layer]:
            del self._arrays[key]

    def close(self) -> None:
        """Frees the file."""
        self.clear()
        if self.arena is not None:
            self.arena.close()
            self.arena = None

    def _write(self, key: Key, value: mx.array) -> None:
        if self.arena is None:
            raise AssertionError("no file was reserved for kept values")
        self.barrier.wait(value)
        self.arena.put(*key, value)
        self.written_bytes += value.nbytes
