"""Keys and values shared by several layers: computed by a donor layer, kept from its forward to its backward pass.

The backward pass reaches every sharing layer before the donor. It sums their gradients in that order, adds the donor's
own last, and only then goes through the donor's norms, rope and projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import mlx.core as mx

from ..model.base import Model, stand_in
from ..model.config import Layer
from ..model.lora import Adapter, first_trained
from ..ops.attention import Attention

Pair = tuple[mx.array, mx.array]  # keys and values, or their gradients: [B, K, T, head_dim]


class SharedKeys:
    """The shared keys and values of one pass. Those of donors below the first layer with a LoRA pair are constants."""

    def __init__(self, layers: Sequence[Layer], adapter: Adapter):
        self.layers, self.adapter = layers, adapter
        self.donors = {layer.donor for layer in layers if layer.donor is not None}
        self.pairs: dict[int, Pair] = {}  # by donor
        self.gradients: dict[int, Pair] = {}

    def is_trained(self, donor: int) -> bool:
        """Whether gradients of its keys and values are needed."""
        return donor >= self._first_trained

    @cached_property
    def _first_trained(self) -> int:
        return first_trained(self.adapter, self.layers)

    def lend(self, layer: Layer, attention: Attention, backward: bool) -> None:
        """Before a layer's pass: gives it its shared keys and values, and in a backward pass their gradients so far."""
        source = layer.donor
        if source is None and backward and layer.index in self.donors:
            source = layer.index
        if source is None:
            return
        attention.keys, attention.values = self.pairs[source]
        if not backward:
            return
        attention.sums_keys = self.is_trained(source)
        if source in self.gradients:
            attention.d_keys, attention.d_values = self.gradients.pop(source)
        if source == layer.index:
            del self.pairs[source]

    def take(self, layer: Layer, attention: Attention) -> None:
        """After a donor's forward pass: takes its keys and values."""
        if layer.index in self.donors and attention.keys is not None and attention.values is not None:
            self.pairs[layer.index] = attention.keys, attention.values

    @staticmethod
    def add(attention: Attention, dk: mx.array, dv: mx.array) -> None:
        """Adds gradients of all keys and values at once, if attention did not sum them itself."""
        if not attention.sums_keys:
            return
        so_far = attention.sums()
        parts = [d.astype(mx.float32) for d in (dk, dv)]
        total = [a + b for a, b in zip(so_far, parts, strict=True)] if so_far else parts
        attention.d_keys, attention.d_values = total

    def take_back(self, layer: Layer, attention: Attention) -> None:
        """After the backward pass of a sharing layer: takes the sum of their gradients."""
        if layer.donor is not None and attention.d_keys is not None and attention.d_values is not None:
            self.gradients[layer.donor] = attention.d_keys, attention.d_values

    def assume(self, model: Model, B: int, T: int) -> None:
        """Stand-ins for all shared keys and values, if only some layers of a model run."""
        spec = model.spec
        for donor in self.donors:
            shape = (B, spec.K, T, spec.layers[donor].head_dim)
            self.pairs[donor] = stand_in(shape, model.dtype), stand_in(shape, model.dtype)
            if self.is_trained(donor):
                self.gradients[donor] = stand_in(shape, mx.float32), stand_in(shape, mx.float32)
