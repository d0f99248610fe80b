"""The input of a plan: a model, its trained parameters and the shape of its batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from ..engine.zeroth_order import Estimator, perturbed
from ..kernels import attention
from ..model.base import Model
from ..model.config import Layer
from ..model.lora import Adapter, Lora, first_trained
from ..ops.plan import Plan


class Updater(Protocol):
    """The part of a run's updater that a probe uses (training/update.py)."""

    def begin_step(self) -> None: ...

    def sink(self, gradients: dict[str, mx.array]) -> list[mx.array] | None: ...


@dataclass(frozen=True)
class Workload:
    """A model, its trained parameters and the shape of its batches.

    B, T: rows of a batch and positions of its longest row; T_eval: of the longest row that is only evaluated;
    make_updater(lora, plan): makes the run's updater for a given Lora (None: gradients are collected); state_bytes: of
    the optimizer's state; gathers: whether a step gathers gradients (clipping, several micro-batches); estimator: of a
    zeroth-order engine, None for exact gradients; forward_only: nothing is trained; travelling_bytes: of gradients in
    transit between machines.
    """

    model: Model
    lora: Lora
    B: int
    T: int
    T_eval: int = 0
    make_updater: Callable[[Lora, Plan], Updater] | None = None
    state_bytes: int = 0
    gathers: bool = False
    estimator: Estimator | None = None
    forward_only: bool = False
    travelling_bytes: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether there is a backward pass."""
        return self.estimator is None and not self.forward_only

    @property
    def adapter(self) -> Adapter:
        """The trainable pairs as a forward pass sees them."""
        if self.estimator is None:
            return self.lora
        return perturbed(self.lora, self.estimator, self.estimator.probes[-1])

    @property
    def forward_passes(self) -> int:
        """The number of forward passes per micro-batch."""
        return 1 if self.estimator is None else len(self.estimator.probes)

    def kind(self, layer: Layer) -> object:
        """A key for layers with the same graphs and sizes, apart from the packing of their matrices."""
        named = {**layer.linears, **layer.experts}
        trained = frozenset(short for short, linear in named.items() if linear.name in self.lora.pairs)
        return layer.block, layer.window, layer.head_dim, trained

    @property
    def T_scored(self) -> int:
        """Positions of the longest row whose attention scores are in memory; longer rows use the kernels."""
        dtype, spec = self.model.dtype, self.model.spec
        is_plain = spec.attention_cap is None and not any("sinks" in layer.arrays for layer in spec.layers)
        if not is_plain or not attention.serves(dtype, spec.head_dim, self.T):
            return self.T
        return int(attention.least_keys(dtype, spec.head_dim)) - 1

    @property
    def lora_bytes(self) -> int:
        return sum(value.nbytes for value in self.lora.parameters().values())

    @property
    def first_trained(self) -> int:
        """The lowest layer with a LoRA pair; the number of layers if none has one; 0 if nothing is trained."""
        if self.forward_only:
            return 0
        return first_trained(self.lora, self.model.spec.layers)
