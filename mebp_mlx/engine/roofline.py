"""What a training step computes and moves, counted from shapes and the engine's own lists of operations.

A matrix product [n, k] x [k, m] is 2 n k m operations; each product with a frozen matrix reads it once, packed, and
reads and writes its activations; where weights are decompressed, they are written and read once more. Norms, gates,
softmax and optimizer are left out: they move what the products around them move. Nothing is assumed about caches.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model.decoder import INPUT, Stage, block_stages, segments
from ..model.spec import Layer, Linear
from .job import Job
from .plan import Plan
from .schedule import backward_ops, needs_gradient


@dataclass(frozen=True)
class Work:
    """Operations of matrix products, bytes through memory, and bytes of the arena written or read."""

    flops: float = 0.0
    memory_bytes: float = 0.0
    arena_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops, self.memory_bytes + other.memory_bytes, self.arena_bytes + other.arena_bytes
        )

    def times(self, factor: float) -> Work:
        """The same work `factor` times."""
        return Work(factor * self.flops, factor * self.memory_bytes, factor * self.arena_bytes)


@dataclass(frozen=True)
class Rates:
    """A machine's operations and bytes a second."""

    flops: float
    memory_bytes: float

    def bound_s(self, work: Work) -> float:
        """The roofline: the least time that the work can take, computing and moving at once."""
        return max(work.flops / self.flops, work.memory_bytes / self.memory_bytes)


def bound_s(phases: dict[str, Work], rates: Rates) -> float:
    """A step's: phases come one after the other."""
    return sum(rates.bound_s(work) for work in phases.values())


def count(job: Job, plan: Plan, forward_passes: int = 2) -> dict[str, Work]:
    """Work of one step on a batch [B, T] by phase: forward, head, backward (of exact gradients only).

    forward_passes: of a zeroth-order step.
    """
    exact = job.engine == "mebp"
    counter = _Counter(job, plan)
    forward = sum((counter.forward(layer) for layer in job.spec.layers), Work())
    head = counter.product(job.spec.head, job.B * job.T)
    if not exact:
        return {"forward": forward.times(forward_passes), "head": head.times(forward_passes)}
    trained = job.spec.layers[job.first_trained :]
    backward = sum((counter.backward(layer, layer.index > job.first_trained) for layer in trained), Work())
    arena = plan.arena_bytes(job.spec, job.B, job.T, len(trained), job.item_bytes)
    saved, loaded = Work(arena_bytes=arena), Work(arena_bytes=arena)
    return {"forward": forward + saved, "head": head.times(2), "backward": backward + loaded}


class _Counter:
    def __init__(self, job: Job, plan: Plan):
        self.job, self.plan, self.spec, self.N = job, plan, job.spec, job.B * job.T
        self.stages = block_stages(self.spec)
        self.before, self.after = segments(self.stages)
        self.saved = plan.saved_for(self.spec)

    def product(self, linear: Linear, n_rows: int) -> Work:
        """One product with a frozen matrix, of n_rows rows."""
        size, item = linear.in_dims * linear.out_dims, self.job.item_bytes
        packing = linear.quantization
        n_bytes = float(size * 2)
        if packing is not None:
            n_bytes = size * (packing.bits / 8 + (4 if packing.mode == "affine" else 1) / packing.group_size)
        if not self.job.packed:
            n_bytes += 2 * size * item
        return Work(2 * n_rows * size, n_bytes + n_rows * (linear.in_dims + linear.out_dims) * item)

    def pair(self, linear: Linear, products: int) -> Work:
        """Products with the two LoRA factors; `products` of each size. Their bytes are nothing beside the matrix's."""
        return Work(products * 2 * self.N * self.job.rank * (linear.in_dims + linear.out_dims))

    def projection(self, layer: Layer, name: str) -> Work:
        linear = layer.linears[name]
        trained = name in self.job.trained[layer.index]
        return self.product(linear, self.N) + (self.pair(linear, 1) if trained else Work())

    def attention(self, layer: Layer, products: int) -> Work:
        """Products of scores' size, over the pairs that causality and window allow."""
        T, window = self.job.T, layer.window or self.job.T
        full = min(T, window)
        pairs = full * (full + 1) / 2 + (T - full) * window
        heads = self.job.B * self.spec.H
        moved = 2 * products * heads * pairs * self.job.item_bytes
        return Work(2 * products * heads * pairs * self.spec.head_dim, moved)

    def run(self, layer: Layer, stage: Stage) -> Work:
        """A stage's forward."""
        if stage.kind == "attention":
            return self.attention(layer, 2)
        return sum((self.projection(layer, name) for name in stage.linears), Work())

    def forward(self, layer: Layer) -> Work:
        return sum((self.run(layer, stage) for stage in self.stages), Work())

    def backward(self, layer: Layer, want_dx: bool) -> Work:
        """Every stage's backward, and what has to be made again for it."""
        trained = self.job.trained[layer.index]
        useful = needs_gradient(self.stages, trained, want_dx)
        total = Work()
        for segment, there in ((self.after, {INPUT, "a"}), (self.before, {INPUT})):
            for op in backward_ops(segment, frozenset(self.saved | there), trained, useful):
                if op.kind == "run" and op.stage is not None:
                    total += self.run(layer, op.stage)
                elif op.kind == "backward" and op.stage is not None:
                    total += self.of_stage(layer, op.stage, bool(op.wanted))
        if useful["a"]:  # fetched for itself and for o's LoRA pair, outside the lists
            total += self.attention(layer, 5)
            by_name = {stage.output: stage for stage in self.before}
            for name in ("q", "k", "v"):
                if name not in self.saved:
                    total += self.run(layer, by_name[name]).times(2 if name == "q" and "a" not in self.saved else 1)
        if "a" not in self.saved and "o" in trained:
            total += self.attention(layer, 2)
        return total

    def of_stage(self, layer: Layer, stage: Stage, want_dx: bool) -> Work:
        """A projection's or the MLP's backward; attention's is counted above."""
        trained, total = self.job.trained[layer.index], Work()
        inner = stage.kind == "mlp"
        for name in stage.linears:
            linear = layer.linears[name]
            through = want_dx or (inner and name == "down")
            total += self.product(linear, self.N) if through else Work()
            # x A and dA in one size, g B^T and dB in the other, and dx's share.
            total += self.pair(linear, 3 if through else 2) if name in trained else Work()
            if inner and name != "down" and name[0] not in self.saved:  # g and u
                total += self.projection(layer, name)
        return total
