"""Measures the memory of a plan: runs some blocks of a model forward and backward, and the head's first chunks.

The blocks run as in training, with the batch's real shape; nothing about them is modelled. If a matrix is read in many
blocks, only some are read and multiplied: products of long rows would take minutes, and their sizes repeat.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..engine.backprop import BackpropEngine, kept_bytes, kept_names, kept_shapes
from ..engine.base import Pass
from ..families import BLOCKS
from ..model.base import Model, WeightBlock
from ..model.config import Layer, Linear
from ..model.lora import Lora
from ..ops.cross_entropy import cross_entropy
from ..ops.plan import Barrier, Plan
from ..system.footprint import PeakMeter
from .workload import Workload

_CHUNKS = 3  # of the head: from the second chunk on, two states are in memory
WHOLE_TILES = 8  # per row; most tiles of a longer row are skipped, else planning would take as long as a step


@dataclass(frozen=True)
class Probe:
    """The result. phases: the process's peak footprint in bytes by phase, without kept values; arrays_bytes: MLX's own
    peak; kept_bytes: of the values that all trained blocks keep.
    """

    phases: dict[str, int]
    arrays_bytes: int
    kept_bytes: int


class _Sampled(Model):
    """A model that multiplies only by the first two blocks of a matrix and by its last; the other products are replaced
    by zeros of the same size.
    """

    def __init__(self, model: Model):
        self.__dict__ |= model.__dict__

    def row_block(self, linear: Linear, start: int, stop: int) -> WeightBlock:
        if linear is self.spec.head or _is_sampled(start, stop, linear.out_dims):
            return super().row_block(linear, start, stop)
        return _Zeros(stop - start, linear.in_dims)

    def column_block(self, linear: Linear, start: int, stop: int) -> WeightBlock:
        if _is_sampled(start, stop, linear.in_dims):
            return super().column_block(linear, start, stop)
        return _Zeros(linear.out_dims, stop - start)


def _is_sampled(start: int, stop: int, n: int) -> bool:
    """Whether a range of n rows or columns is the first, the second or the last of its length."""
    return start <= stop - start or stop == n


@dataclass(frozen=True)
class _Zeros:
    """A block [n_out, n_in] of a matrix without its weights; its products are zeros."""

    n_out: int
    n_in: int

    def matmul(self, x: mx.array) -> mx.array:
        return mx.zeros((*x.shape[:-1], self.n_out), x.dtype)

    def matmul_t(self, g: mx.array) -> mx.array:
        return mx.zeros((*g.shape[:-1], self.n_in), g.dtype)


def probe(workload: Workload, plan: Plan, arena_dir: str | Path | None = None) -> Probe:
    """Runs some blocks of each kind under `plan`, but with kept values and optimizer state in files: how much of them
    stays in memory is calculated afterwards. Parameters and optimizer state are not changed.
    """
    plan = dataclasses.replace(plan, kept_bytes=0, offload_state=workload.is_exact)
    workload = dataclasses.replace(workload, model=_Sampled(workload.model))
    model, lora = workload.model, workload.lora
    kept: list[int] = []
    if workload.is_exact:
        kept = kept_bytes(model, plan, lora, workload.first_trained, workload.B, workload.T)
    engine = BackpropEngine(model, lora, plan=plan, arena_dir=arena_dir)
    mx.reset_peak_memory()
    try:
        with PeakMeter() as meter:
            if workload.is_exact:
                for T in dict.fromkeys((workload.T, workload.T_scored)):
                    for layers in _kinds(workload, engine.barrier.is_lazy):
                        of_length = dataclasses.replace(workload, T=T)
                        _exact(of_length, plan, engine, meter, layers, max(kept, default=0))
            else:
                _forward(workload, plan, engine, meter, workload.T)
            if workload.T_eval > workload.T:
                _forward(workload, plan, engine, meter, workload.T_eval)
    finally:
        engine.close()
    return Probe(dict(meter.phases), mx.get_peak_memory(), sum(kept))


def _kinds(workload: Workload, is_lazy: bool) -> list[list[Layer]]:
    """Trained layers of each kind: two, or with lazy graphs one more than are in flight together."""
    kinds: dict[object, list[Layer]] = {}
    for layer in workload.model.spec.layers[workload.first_trained :]:
        kinds.setdefault(workload.kind(layer), []).append(layer)
    return [layers[: 3 if is_lazy else 2] for layers in kinds.values()]


def _exact(
    workload: Workload, plan: Plan, engine: BackpropEngine, meter: PeakMeter, layers: list[Layer], block_bytes: int
) -> None:
    model, B, T = workload.model, workload.B, workload.T
    engine.store.clear()
    engine.store.reserve(len(layers) * block_bytes, block_bytes)
    dropout = (0, 0, 0, 0) if workload.lora.dropout else None
    work = Pass(model, plan, workload.lora, engine.barrier, dropout)
    _leave_tiles_out(workload, plan, work, layers, T)
    tokens = np.zeros((B, T), np.int32)
    with meter.phase("forward"):
        x = work.embed(tokens)
        work.assume(B, T)
        for layer in layers:
            x = work.forward(layer, x, engine.store, kept_names(plan, layer))
            engine.store.write_behind()
    with meter.phase("head"):
        dx = cross_entropy(work, x, tokens, need_dx=True, max_chunks=_CHUNKS).dx
        engine.barrier.wait(*(dx or []))
        engine.store.write_behind()
    assert dx is not None
    with meter.phase("backward"):
        for layer in reversed(layers):
            sink = _Update(workload, plan, meter, f"{layer.prefix}.")
            dx = engine.backward(work, layer, dx, need_dx=layer.index > 0, sink=sink)
        mx.synchronize()
    engine.barrier.finish()
    engine.store.clear()


def _leave_tiles_out(workload: Workload, plan: Plan, work: Pass, layers: list[Layer], T: int) -> None:
    """Skips most tiles of attention blocks for long rows, whose cost is quadratic; they only keep their values."""
    if len(plan.tiles(T)) <= WHOLE_TILES:
        return
    unread = Pass(workload.model.unread(), plan, workload.adapter, Barrier(None))
    unread.T = T
    for layer in layers:
        if hasattr(BLOCKS[layer.block], "K") and {"k", "v"} <= layer.linears.keys():
            kept = kept_shapes(unread, layer, workload.B, plan.tiles(T)[0][1]).kept
            work.left_out[layer.index] = {name: shape for (_, name, _), shape in kept.items()}


class _Update:
    """The update of one block's parameters; its results are discarded."""

    def __init__(self, workload: Workload, plan: Plan, meter: PeakMeter, prefix: str):
        self.meter, self.updater = meter, None
        if workload.make_updater is not None:
            lora = workload.lora
            # Copies, because an update may overwrite them.
            own = {name: value + 0 for name, value in lora.parameters().items() if name.startswith(prefix)}
            mx.eval(own)
            part = Lora(
                own, rank=lora.rank, scale=lora.scale, dropout=lora.dropout, keys=lora.keys, num_layers=lora.num_layers
            )
            self.updater = workload.make_updater(part, plan)
            self.updater.begin_step()

    def __call__(self, gradients: dict[str, mx.array]) -> list[mx.array] | None:
        if self.updater is None:
            return None
        with self.meter.phase("update"):
            return self.updater.sink(gradients)


def _forward(workload: Workload, plan: Plan, engine: BackpropEngine, meter: PeakMeter, T: int) -> None:
    work = Pass(workload.model, plan, workload.adapter, engine.barrier)
    tokens = np.zeros((workload.B, T), np.int32)
    if workload.estimator is not None:
        workload.estimator.begin(0)
    layers = [layer for kind in _kinds(workload, engine.barrier.is_lazy) for layer in kind]
    _leave_tiles_out(workload, plan, work, layers, T)
    with meter.phase("forward"):
        x = work.embed(tokens)
        work.assume(workload.B, T)
        for layer in layers:
            x = work.forward(layer, x)
    with meter.phase("head"):
        cross_entropy(work, x, tokens, need_dx=False, max_chunks=_CHUNKS)
    engine.barrier.finish()
