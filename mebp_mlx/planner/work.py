"""Counts the operations and bytes of a step on its own graphs, which are built but never evaluated.

A matrix product [n, k] x [k, m] is 2 n k m operations; products and decompressions read their inputs from memory and
write their outputs to it. Norms, gates, softmax and optimizer are left out: they move the same arrays as the products
around them. No caches are assumed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np

from ..engine.backprop import block_backward, kept_bytes, kept_shapes
from ..engine.base import Pass
from ..kernels import attention, cpu
from ..model.config import Layer
from ..ops.cross_entropy import scan
from ..ops.plan import Barrier, Plan
from .workload import Workload

_PRODUCTS = ("Matmul", "QuantizedMatmul", "AddMM")
_MOVERS = (*_PRODUCTS, *attention.NAMES, "Quantize", "AffineQuantize")  # Quantize: also mx.dequantize


@dataclass(frozen=True)
class Work:
    """Operations of matrix products, bytes through memory, and bytes of the file written or read."""

    flops: float = 0.0
    memory_bytes: float = 0.0
    arena_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def times(self, factor: float) -> Work:
        """The work multiplied by `factor`."""
        return Work(factor * self.flops, factor * self.memory_bytes, factor * self.arena_bytes)


@dataclass(frozen=True)
class Rates:
    """A machine's operations and bytes per second."""

    flops: float
    memory_bytes: float

    def bound_s(self, work: Work) -> float:
        """The roofline: the least time for the work if computation and data movement overlap."""
        return max(work.flops / self.flops, work.memory_bytes / self.memory_bytes)


@dataclass(frozen=True)
class Node:
    """One primitive of a graph: its name or its kernel's, and (shape, item bytes) of its inputs and outputs.

    place: an attention kernel's argument for the position of its queries; () for other primitives.
    """

    name: str
    inputs: tuple[tuple[tuple[int, ...], int], ...]
    outputs: tuple[tuple[tuple[int, ...], int], ...]
    place: tuple[int, ...] = ()

    @property
    def flops(self) -> float:
        """Operations of a matrix product or of attention; 0 for any other primitive."""
        if self.place:
            (q, item_bytes), (k, _) = self.inputs[:2]
            return attention.operations(self.name, (q, k), item_bytes, self.place)
        if self.name not in _PRODUCTS:
            return 0.0
        return 2.0 * prod(self.outputs[0][0]) * self.inputs[0][0][-1]

    @property
    def n_bytes(self) -> float:
        """Bytes read and written."""
        return float(sum(prod(shape) * item for shape, item in (*self.inputs, *self.outputs)))


def nodes_of(run: Callable[..., list[mx.array]], *inputs: mx.array) -> list[Node]:
    """The primitives of the graph that `run` builds on `inputs`, without the numpy paths.

    MLX merges equal primitives with the same inputs: scores of recomputed attention appear once.
    """
    nodes: list[Node] = []
    constants: dict[str, mx.array] = {}

    def visit(event: dict[str, Any]) -> None:
        if event["type"] == "constants":
            constants.update(event["constants"])
        if event["type"] == "primitive":
            inputs, outputs = (tuple((tuple(a[1]), a[2].size) for a in event[side]) for side in ("inputs", "outputs"))
            called = str(event["arguments"][0]) if event["name"] == "CustomKernel" else ""
            name = next((name for name in attention.NAMES if called.startswith(f"custom_kernel_{name}_")), None)
            place: tuple[int, ...] = (
                () if name is None else tuple(map(int, np.asarray(constants[event["inputs"][-2][0]])))
            )
            nodes.append(Node(name or event["name"], inputs, outputs, place))

    with cpu.off():
        mx.export_function(visit, run, *inputs)
    return nodes


def bound_s(phases: dict[str, Work], rates: Rates) -> float:
    """The least time of a step whose phases run one after another."""
    return sum(rates.bound_s(work) for work in phases.values())


def on_phone(workload: Workload) -> Workload:
    """The workload on a phone's GPU: 16 bits, packed weights."""
    model = copy.copy(workload.model)
    model.dtype, model.packed = mx.bfloat16, True
    return dataclasses.replace(workload, model=model)


def count(workload: Workload, plan: Plan) -> dict[str, Work]:
    """Work of one micro-batch by phase: forward, head, backward (of exact gradients only)."""
    counter = _Counter(workload, plan)
    layers, passes = workload.model.spec.layers, workload.forward_passes
    forward = sum((counter.forward(layer) for layer in layers), Work()).times(passes)
    head = counter.head().times(passes)
    if not workload.is_exact:
        return {"forward": forward, "head": head}
    trained = layers[workload.first_trained :]
    backward = sum((counter.backward(layer, layer.index > workload.first_trained) for layer in trained), Work())
    in_file = Work(arena_bytes=counter.file_bytes())
    return {"forward": forward + in_file, "head": head, "backward": backward + in_file}


class _Counter:
    def __init__(self, workload: Workload, plan: Plan):
        self.workload, self.plan = workload, plan
        self.model = workload.model.unread()
        self.work = Pass(self.model, plan, workload.lora, Barrier(None))
        self.known: dict[object, Work] = {}  # by the properties that a layer's graph depends on

    def forward(self, layer: Layer) -> Work:
        def run(*x: mx.array) -> list[mx.array]:
            self.work.assume(self.workload.B, self.workload.T)  # resets the state left by another graph
            return self.work.forward(layer, list(x))

        return self._once(("forward", self._kind(layer)), run)

    def backward(self, layer: Layer, need_dx: bool) -> Work:
        shapes = kept_shapes(self.work, layer, self.workload.B, self.workload.T)

        def run(*dy: mx.array) -> list[mx.array]:
            self.work.assume(self.workload.B, self.workload.T)
            block = self.work.run(layer, shapes, None)
            dx = block_backward(self.work, layer, block, list(dy), need_dx)
            return [*dx, *block.gradients.values(), *(block.attention.sums() if layer.donor is not None else ())]

        return self._once(("backward", need_dx, self._kind(layer)), run)

    def head(self) -> Work:
        spec, n_rows = self.model.spec, self.workload.B * self.workload.T
        labels = mx.zeros((n_rows,), mx.int32)

        def run(h: mx.array) -> list[mx.array]:
            state = scan(self.work, h, labels, self.workload.is_exact)
            return [part for part in state if part is not None]

        return _sum(nodes_of(run, mx.zeros((n_rows, spec.D), self.model.dtype)))

    def file_bytes(self) -> int:
        """Bytes that the forward pass writes and the backward pass reads."""
        w = self.workload
        kept = sum(kept_bytes(w.model, self.plan, w.lora, w.first_trained, w.B, w.T))
        return 0 if self.plan.kept_bytes is None else max(0, kept - self.plan.kept_bytes)

    def _once(self, key: object, run: Callable[..., list[mx.array]]) -> Work:
        if key not in self.known:
            self.known[key] = _sum(nodes_of(run, *self._tiles()))
        return self.known[key]

    def _kind(self, layer: Layer) -> object:
        packed = tuple(linear.quantization for linear in layer.matrices.values())
        return self.workload.kind(layer), layer.index in self.work.shared.donors, packed

    def _tiles(self) -> list[mx.array]:
        B, D = self.workload.B, self.model.spec.D
        return [mx.zeros((B, stop - start, D), self.model.dtype) for start, stop in self.plan.tiles(self.workload.T)]


def _sum(nodes: list[Node]) -> Work:
    moved = sum(node.n_bytes for node in nodes if node.name in _MOVERS)
    return Work(float(np.sum([node.flops for node in nodes])), moved)
