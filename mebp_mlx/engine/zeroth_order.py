"""MeZO: a gradient estimate from two forward passes, its noise regenerated and never stored.

    z ~ N(0, I);  c = (L(theta + eps z) - L(theta - eps z)) / (2 eps);  gradient estimate = c z

The perturbed parameters are made where a block uses them, so theta itself is never moved
and restoring it costs nothing and loses no bit.
"""

from __future__ import annotations

import math

import mlx.core as mx

from ..errors import NonFiniteLoss
from ..model.frozen import Model
from ..model.lora import Lora, Pair, random_key
from ..model.spec import Linear
from .backprop import Sink, TokenBatch, forward_loss
from .plan import Plan


class Perturbed:
    """A Lora seen at theta + amount * z, z being a pure function of `noise_parts` and each parameter's name."""

    def __init__(self, lora: Lora, amount: float, noise_parts: tuple[int, ...]):
        self.lora, self.amount, self.noise_parts = lora, amount, noise_parts
        self.scale, self.dropout = lora.scale, lora.dropout

    def trains(self, linear: Linear) -> bool:
        return self.lora.trains(linear)

    def pair(self, linear: Linear) -> Pair | None:
        pair = self.lora.pair(linear)
        if pair is None:
            return None
        return Pair(
            pair.a + self.amount * gaussian(self.noise_parts, f"{linear.name}.lora_a", pair.a.shape),
            pair.b + self.amount * gaussian(self.noise_parts, f"{linear.name}.lora_b", pair.b.shape),
        )


class MezoEngine:
    """The engine `mezo`: the footprint of a forward pass, and two of them a step."""

    def __init__(self, model: Model, lora: Lora, *, plan: Plan | None = None, seed: int = 0, eps: float = 1e-2):
        self.model, self.lora, self.seed, self.eps = model, lora, seed, eps
        self.plan = plan or Plan()

    def reserve(self, batch_size: int, n_tokens: int) -> None:
        """Nothing to make room for: no activation is kept."""

    def step(self, batch: TokenBatch, *, step: int, micro: int, n_labels: int, sink: Sink) -> float:
        """The mean of the two perturbed losses, as the batch's share; the estimates c z go to `sink` block by block.

        All micro-batches of a step use the same z, so their estimates add up to one estimate on the whole step.
        """
        noise = (self.seed, step)
        # Both passes draw the same dropout masks: the difference must come from z alone.
        dropout = (self.seed, step, micro)
        losses = []
        for sign in (1, -1):
            adapter = Perturbed(self.lora, sign * self.eps, noise)
            loss_sum, _ = forward_loss(self.model, self.plan, adapter, batch, dropout)
            losses.append(loss_sum / max(n_labels, 1))
            if not math.isfinite(losses[-1]):
                raise NonFiniteLoss(f"loss is {losses[-1]}")
        c = (losses[0] - losses[1]) / (2 * self.eps)
        parameters = self.lora.parameters()
        for layer in reversed(self.model.spec.layers):
            names = [name for name in parameters if name.startswith(f"{layer.prefix}.")]
            estimate = {name: c * gaussian(noise, name, parameters[name].shape) for name in names}
            mx.eval(estimate)
            if estimate:
                sink(estimate)
        return sum(losses) / 2

    def evaluate(self, batch: TokenBatch) -> tuple[float, int]:
        """(sum of the labelled tokens' losses, their number) at theta itself, without dropout."""
        return forward_loss(self.model, self.plan, self.lora, batch)

    def close(self) -> None:
        """Nothing is held."""


def gaussian(noise_parts: tuple[int, ...], name: str, shape: tuple[int, ...]) -> mx.array:
    """The noise of one parameter: standard normal, the same whenever it is asked for."""
    return mx.random.normal(shape, key=random_key("noise", *noise_parts, name))
