"""MeBP: exact LoRA gradients, block by block.

The forward pass keeps the values of each block that the plan names (Store). The backward pass visits the blocks in
reverse, and each block's tiles from last to first; it passes on a block's gradients as soon as they are complete.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import mlx.core as mx

from ..errors import NonFiniteLoss
from ..families import BLOCKS
from ..families.base import BlockRun
from ..kernels import cpu
from ..model.base import Model, stand_in
from ..model.config import Layer
from ..model.lora import Adapter, Lora, first_trained, flat, pairs_of
from ..model.prefetch import Prefetch
from ..ops.cross_entropy import cross_entropy
from ..ops.plan import SAVE_INPUTS, Barrier, Plan
from ..system.pages import page_ceil
from .base import Evaluation, Pass, Sink, Store, TokenBatch, first_row, hand_over_zeros


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
        self.barrier = Barrier(self.plan.grain)
        self.store = Store(self.barrier, self.plan.kept_bytes, arena_dir)
        self.ahead = Prefetch(model)
        self._reserved = (0, 0)  # rows and positions of the largest batch that fits the file
        # Blocks below the lowest trained one need no gradient: none of their values are kept, and they are not visited.
        self.first_trained = first_trained(lora, model.spec.layers)

    def reserve(self, batch_size: int, n_tokens: int) -> None:
        """Reserves space for the kept values of batches [batch_size, n_tokens]. Raises UserError on a full disk."""
        rows, tokens = self._reserved
        if self.plan.kept_bytes is None or (batch_size <= rows and n_tokens <= tokens):
            return
        self._reserved = (batch_size, n_tokens)
        n_bytes = kept_bytes(self.model, self.plan, self.lora, self.first_trained, batch_size, n_tokens)
        self.store.reserve(sum(n_bytes), max(n_bytes, default=0))

    def step(self, batch: TokenBatch, *, step: int, micro: int, n_labels: int, sink: Sink) -> float:
        """Returns the batch's share of the step's loss; passes its gradients to `sink`, last block first.

        n_labels: labelled tokens of the whole optimizer step, over all its micro-batches and machines, so that shares
        and gradients add up to the token-weighted mean. Raises NonFiniteLoss before passing on any gradient.
        """
        self.store.clear()
        if not batch.tokens.size:
            hand_over_zeros(self.lora, self.model.spec.layers[self.first_trained :], sink)
            return 0.0
        self.reserve(*batch.tokens.shape)
        weight = 1 / max(n_labels, 1)
        # In float16, one token's share of a mean would underflow: differentiate the sum instead.
        loss_scale = 1.0 if self.model.dtype != mx.float16 else float(max(n_labels, 1))
        dropout_parts = (first_row(batch), self.seed, step, micro) if self.dropout else None
        work = Pass(self.model, self.plan, self.lora, self.barrier, dropout_parts, self.ahead)
        x = work.embed(batch.tokens)
        for layer in self.model.spec.layers:
            keeps = layer.index >= self.first_trained
            x = work.forward(layer, x, *((self.store, kept_names(self.plan, layer)) if keeps else ()))
            self.store.write_behind()
        result = cross_entropy(work, x, batch.targets, need_dx=True, weight=weight * loss_scale)
        self.store.write_behind()
        if not math.isfinite(result.loss_sum):
            raise NonFiniteLoss(f"loss is {result.loss_sum * weight}")
        loss, dx = result.loss_sum * weight, result.dx or []
        del result
        for layer in reversed(self.model.spec.layers[self.first_trained :]):
            dx = self.backward(work, layer, dx, need_dx=layer.index > self.first_trained, sink=sink, scale=loss_scale)
        self.barrier.finish()
        return loss

    def backward(
        self, work: Pass, layer: Layer, dy: list[mx.array], need_dx: bool, sink: Sink, scale: float = 1.0
    ) -> list[mx.array]:
        """Tiles of dL/dy (emptied) -> tiles of dL/dx, or none; the block's gradients / scale go to `sink`."""
        self.ahead.block(layer.index - 1)
        run = work.run(layer, self.store, None)
        dx = block_backward(work, layer, run, dy, need_dx)
        self.store.forget(layer.index)
        gradients = run.gradients if scale == 1 else {n: g * (1 / scale) for n, g in run.gradients.items()}
        sums = run.attention.sums() if layer.donor is not None else []
        self.barrier.tile(*dx[:1], *(sink(gradients) or gradients.values()), *sums)
        self.barrier.block()
        return dx

    def evaluate(self, batch: TokenBatch) -> Evaluation:
        """A forward pass, without dropout."""
        return Pass(self.model, self.plan, self.lora, self.barrier, ahead=self.ahead).loss(batch)

    def close(self) -> None:
        """Frees the file and stops the prefetch thread."""
        self.ahead.close()
        self.store.close()


def block_backward(work: Pass, layer: Layer, run: BlockRun, dy: list[mx.array], need_dx: bool) -> list[mx.array]:
    """Tiles of dL/dy (emptied) -> tiles of dL/dx, or none. Goes from last to first; gradients are left in `run`."""
    if work.plan.checkpoint:
        return _checkpointed(work, layer, run, dy, need_dx)
    run.begin(sum(tile.shape[1] for tile in dy))
    position = 0
    dx: list[mx.array] = []
    for tile in dy:
        run.blocks.append(run.block(run, position, tile.shape[:2]))
        position += tile.shape[1]
    n_tiles = len(dy)
    while dy:
        is_run = work.runs(layer, len(dy) - 1, n_tiles)
        gradient = run.blocks[-1].backward(dy.pop(), need_dx) if is_run else dy.pop()
        if gradient is not None:
            dx.append(gradient)
        del gradient
        run.blocks.pop()
        run.shared.clear()
        if dy:  # the first tile is submitted with the block's update
            work.barrier.tile(*dx[-1:], *run.gradients.values(), *run.attention.sums(), *run.carried.values())
    work.shared.take_back(layer, run.attention)
    return dx[::-1]


def _checkpointed(work: Pass, layer: Layer, run: BlockRun, dy: list[mx.array], need_dx: bool) -> list[mx.array]:
    """block_backward by mx.checkpoint and MLX's own backward, from the block's inputs alone."""
    inputs, position = [], 0
    for tile in dy:
        x = run.kept.get("x", position)
        assert x is not None
        inputs.append(x)
        position += tile.shape[1]
    names = [linear.name for linear in layer.matrices.values() if linear.name in work.adapter.pairs]
    trainables, n_tiles, attention = flat({name: work.adapter.pairs[name] for name in names}), len(dy), run.attention
    plain = Pass(work.model, work.plan, work.adapter, Barrier(None), work.dropout_parts)
    plain.tokens = work.tokens
    lent = [] if layer.donor is None else list(work.shared.pairs[layer.donor])
    gives = attention.sums() if layer.donor is None else []

    def block(*arrays: mx.array) -> list[mx.array]:
        n = n_tiles + len(trainables)
        own = pairs_of(dict(zip(trainables, arrays[n_tiles:n], strict=True)))
        plain.adapter = Adapter(own, work.adapter.scale, work.adapter.dropout)
        if layer.donor is not None:
            plain.shared.pairs[layer.donor] = arrays[n], arrays[n + 1]
        return [*plain.forward(layer, list(arrays[:n_tiles])), *(plain.shared.pairs[layer.index] if gives else ())]

    # Trainables, and shared keys and values, are arguments: captured arrays would silently get zero gradients.
    with cpu.off():
        cotangents = [*dy, *(g.astype(work.model.dtype) for g in gives)]
        _, gradients = mx.vjp(mx.checkpoint(block), [*inputs, *trainables.values(), *lent], cotangents)
        n = n_tiles + len(trainables)
        run.gradients.update(zip(trainables, gradients[n_tiles:n], strict=True))
        dx = gradients[:n_tiles] if need_dx else []
        if lent:
            work.shared.add(attention, *gradients[n:])
        work.barrier.value(*dx, *run.gradients.values(), *attention.sums())
    work.shared.take_back(layer, attention)
    dy.clear()
    return dx


def kept_names(plan: Plan, layer: Layer) -> frozenset[str]:
    """Names of the values of a layer that the plan keeps for its backward pass, including the block's input.

    Queries and keys are kept after rotation, unless a norm's backward needs them before it.
    """
    block = BLOCKS[layer.block]
    names = ((SAVE_INPUTS if plan.checkpoint else plan.saved) & block.names) - block.not_read
    names -= {name for name, other in block.serves.items() if other in names}
    if "q_norm" not in layer.norms:
        names = frozenset({"q": "Q", "k": "K"}.get(name, name) for name in names)
    return names | block.always


def kept_bytes(model: Model, plan: Plan, adapter: Adapter, index: int, B: int, T: int) -> list[int]:
    """Bytes, in whole pages, that each block from `index` on keeps for a batch [B, T]."""
    return KeptSizes(model, plan, adapter, index, B, T).of(plan)


class KeptSizes:
    """Bytes, in whole pages, that each block from `index` on would keep for a batch [B, T], whichever values are saved.

    Counted on unevaluated forward graphs, for one layer of each kind and one tile of each length. Layers of a kind have
    the same matrices and storage, which sets the MLP's blocks; each kept value fills whole pages.
    """

    def __init__(self, model: Model, plan: Plan, adapter: Adapter, index: int, B: int, T: int):
        self.layers = model.spec.layers[index:]
        self.work, self.model, self.B = Pass(model.unread(), plan, adapter, Barrier(None)), model, B
        self.work.T = T
        self.lengths = Counter(stop - start for start, stop in plan.tiles(T))
        self.known: dict[object, Counter[str]] = {}

    def of(self, plan: Plan) -> list[int]:
        """Kept bytes of each layer, for a plan with the same tiles and blocks."""
        return [sum(self._by_name(layer)[name] for name in kept_names(plan, layer)) for layer in self.layers]

    def _by_name(self, layer: Layer) -> Counter[str]:
        """Bytes of each value, summed over all tiles."""
        linears = {**layer.linears, **layer.experts}
        widths = tuple((short, linear.out_dims, linear.in_dims) for short, linear in linears.items())
        # The window decides whether attention keeps a log-sum-exp.
        kind = layer.block, layer.window, widths, self.model.copied_bytes(linears["down"], 1)
        if kind not in self.known:
            sizes = self.known[kind] = Counter()
            for length, n_tiles in self.lengths.items():
                names = BLOCKS[layer.block].names | BLOCKS[layer.block].always
                shapes = kept_shapes(self.work, layer, self.B, length, names)
                for (_, name, _), n_bytes in shapes.n_bytes.items():
                    sizes[name.partition(".")[0]] += n_tiles * n_bytes
        return self.known[kind]


def kept_shapes(work: Pass, layer: Layer, B: int, T: int, names: frozenset[str] | None = None) -> Shapes:
    """Shapes that a block keeps for a batch [B, T]. `work`: a pass over an unread model, which evaluates nothing.

    names: of the values to keep; None keeps those that the plan names.
    """
    shapes = Shapes()
    work.assume(B, T)
    with cpu.off():
        x = [mx.zeros((B, stop - start, work.model.spec.D), work.model.dtype) for start, stop in work.plan.tiles(T)]
        work.forward(layer, x, shapes, kept_names(work.plan, layer) if names is None else names)
    return shapes


class Shapes:
    """Shapes of kept values, without data (families/base.py: Kept). n_bytes: size of each value in whole pages."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, str, int], tuple[tuple[int, ...], mx.Dtype]] = {}
        self.n_bytes: dict[tuple[int, str, int], int] = {}

    def put(self, layer: int, name: str, tile: int, value: mx.array) -> bool:
        self.kept[layer, name, tile] = (value.shape, value.dtype)
        self.n_bytes[layer, name, tile] = page_ceil(value.nbytes)
        return True

    def get(self, layer: int, name: str, tile: int) -> mx.array | None:
        known = self.kept.get((layer, name, tile))
        return None if known is None else stand_in(*known)

    take = get
