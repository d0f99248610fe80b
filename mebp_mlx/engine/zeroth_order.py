"""Zeroth-order gradient estimates: a few forward passes along random directions, whose noise is never stored.

    MeZO    z ~ N(0, I);  c = (L(theta + eps z) - L(theta - eps z)) / (2 eps);  estimate = c z
    K-ZOO   MeZO with the seed of z from a pool of K: theta is theta_0 and K numbers (FedKSeed; Pro: seeds that
            gave large slopes are drawn more often)
    HiZOO   z is scaled by H^(-1/2), H a running diagonal estimate of the curvature
    FZOO    u_i = +-1, i = 1..N;  estimate = sum_i (L(theta + eps u_i) - L(theta)) / (N std_i) u_i

Equations: Malladi et al. 2023, Qin et al. 2024 (FedKSeed), Zhao et al. 2025 (HiZOO), Dang et al. 2025 (FZOO). Perturbed
parameters are computed where a block uses them, so theta never changes and needs no lossy restore. A loss that is not
finite ends the run, in K-ZOO too (FedKSeed's authors skip such a step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import NonFiniteLoss
from ..model.base import Model
from ..model.lora import Adapter, Lora, Pair, random_key
from ..ops.plan import Barrier, Plan
from .base import Evaluation, Pass, Sink, TokenBatch, first_row

HISTORY_CLIP = 1000.0  # FedKSeed-Pro's bound on a slope in its history


class Probe(NamedTuple):
    """A point at which the loss is evaluated: theta + amount * direction(number)."""

    amount: float
    number: int = 0


class Estimator:
    """Computes the gradient estimate from losses at a step's probes. This one is MeZO's; subclasses override parts.

    Call begin(step) first, then direction() any number of times during the probes' forward passes; observe() takes the
    whole step's losses, one per probe, and gradient() then returns the estimate, parameter by parameter.
    """

    loss_at: str | None = "mean of both sides"  # the point that loss() belongs to; None: theta itself

    def __init__(self, seed: int, eps: float):
        self.seed, self.eps, self.step = seed, eps, 0
        self.slope = 0.0

    @property
    def probes(self) -> tuple[Probe, ...]:
        return Probe(self.eps), Probe(-self.eps)

    def begin(self, step: int) -> None:
        """Chooses the directions of a step: a pure function of seed, step and state."""
        self.step = step

    def direction(self, index: int, name: str, shape: tuple[int, ...]) -> mx.array:
        """The step's direction number `index` for one parameter; the same at every call."""
        return gaussian((self.seed, self.step), name, shape)

    def observe(self, losses: np.ndarray) -> None:
        """Takes the step's mean losses at the probes, float64."""
        self.slope = float(losses[0] - losses[1]) / (2 * self.eps)

    def gradient(self, name: str, shape: tuple[int, ...]) -> mx.array:
        """The estimate for one parameter, float32; called once per step."""
        return self.slope * self.direction(0, name, shape)

    def loss(self, losses: np.ndarray) -> float:
        """The step's loss for the log: the mean of both sides, or the loss at theta itself."""
        return float(losses.mean())

    def state(self) -> dict[str, mx.array]:
        """The state that a resumed run needs besides seed and step; references the current arrays."""
        return {}

    def load(self, state: Mapping[str, mx.array]) -> None:
        """Loads the state of another estimator with the same options."""


class SeedPool(Estimator):
    """K-ZOO: noise from a pool of `n_seeds`, each with the sum of its slopes; pro: draw by importance.

    With plain SGD at a constant rate, the trained parameters equal rebuild()'s up to float32 rounding.
    """

    def __init__(self, seed: int, eps: float, n_seeds: int, pro: bool):
        super().__init__(seed, eps)
        self.pro, self.chosen = pro, 0
        self.sums, self.magnitudes, self.counts = (np.zeros(n_seeds, np.float32) for _ in range(3))

    def begin(self, step: int) -> None:
        super().begin(step)
        rng = np.random.default_rng([self.seed, step])
        self.chosen = int(rng.choice(len(self.sums), p=self.probabilities() if self.pro else None))

    def probabilities(self) -> np.ndarray:
        """softmax(minmax(mean |clip(slopes of a seed)|)), float64 [K]; the mean is 0 for a seed without history."""
        means = self.magnitudes.astype(np.float64) / np.maximum(self.counts, 1)
        spread = means.max() - means.min()
        weights = np.exp((means - means.min()) / spread) if spread > 0 else np.ones_like(means)
        return weights / weights.sum()

    def direction(self, index: int, name: str, shape: tuple[int, ...]) -> mx.array:
        return pool_noise(self.seed, self.chosen, name, shape)

    def observe(self, losses: np.ndarray) -> None:
        super().observe(losses)
        self.slope = float(np.float32(self.slope))  # the sum must equal the applied updates
        self.sums[self.chosen] += np.float32(self.slope)
        self.magnitudes[self.chosen] += np.float32(min(abs(self.slope), HISTORY_CLIP))
        self.counts[self.chosen] += 1

    def state(self) -> dict[str, mx.array]:
        return {"sums": mx.array(self.sums), "magnitudes": mx.array(self.magnitudes), "counts": mx.array(self.counts)}

    def load(self, state: Mapping[str, mx.array]) -> None:
        self.sums, self.magnitudes, self.counts = (np.array(state[k]) for k in ("sums", "magnitudes", "counts"))


class Curvature(Estimator):
    """HiZOO: H starts at 1, the losses are taken at theta +- eps H^(-1/2) z and theta,

        H_new = (1 - a) H + a |l+ + l- - 2 l0| / (2 eps^2) H z z;  estimate = (l+ - l-) / (2 eps) z / sqrt(H_new)

    One more array for each parameter. A step multiplies H, so log H is stored: the increment, about the published
    a = 1e-8, would be lost when added to H in float32. alpha = 0 is MeZO plus a forward pass.
    """

    loss_at = None

    def __init__(self, seed: int, eps: float, alpha: float, parameters: Mapping[str, mx.array]):
        super().__init__(seed, eps)
        self.alpha, self.bend = alpha, 0.0
        self.log_diagonal = {name: mx.zeros(value.shape) for name, value in parameters.items()}
        mx.eval(self.log_diagonal)

    @property
    def probes(self) -> tuple[Probe, ...]:
        return Probe(0.0), Probe(self.eps), Probe(-self.eps)

    def direction(self, index: int, name: str, shape: tuple[int, ...]) -> mx.array:
        return super().direction(index, name, shape) * mx.exp(-0.5 * self.log_diagonal[name])

    def observe(self, losses: np.ndarray) -> None:
        super().observe(losses[1:])
        self.bend = abs(float(losses[1] + losses[2] - 2 * losses[0])) / (2 * self.eps**2)

    def gradient(self, name: str, shape: tuple[int, ...]) -> mx.array:
        z = super().direction(0, name, shape)
        after = self.log_diagonal[name] + mx.log1p(self.alpha * (self.bend * z * z - 1))
        mx.eval(after)
        self.log_diagonal[name] = after
        return self.slope * (z * mx.exp(-0.5 * after))

    def loss(self, losses: np.ndarray) -> float:
        return float(losses[0])

    def state(self) -> dict[str, mx.array]:
        return dict(self.log_diagonal)

    def load(self, state: Mapping[str, mx.array]) -> None:
        self.log_diagonal = dict(state)


class Normalized(Estimator):
    """FZOO: one-sided differences along `n_samples` directions of signs, over their standard deviation.

    eps is absorbed in the learning rate, and the estimate does not change with the scale of the loss.
    """

    loss_at = None

    def __init__(self, seed: int, eps: float, n_samples: int):
        super().__init__(seed, eps)
        self.weights = np.zeros(n_samples)

    @property
    def probes(self) -> tuple[Probe, ...]:
        return Probe(0.0), *(Probe(self.eps, index) for index in range(len(self.weights)))

    def direction(self, index: int, name: str, shape: tuple[int, ...]) -> mx.array:
        return signs((self.seed, self.step, index), name, shape)

    def observe(self, losses: np.ndarray) -> None:
        deviation = losses[1:].std()
        differences = losses[1:] - losses[0]
        # Zero deviation: there is no slope to estimate.
        self.weights = differences / (len(differences) * deviation) if deviation > 0 else np.zeros(len(differences))

    def gradient(self, name: str, shape: tuple[int, ...]) -> mx.array:
        total = mx.zeros(shape)
        for index, weight in enumerate(self.weights):
            total = total + float(weight) * self.direction(index, name, shape)
            mx.eval(total)
        return total

    def loss(self, losses: np.ndarray) -> float:
        return float(losses[0])


class Perturbed(Mapping[str, Pair]):
    """A Lora's pairs at a probe: theta + amount * direction, computed when a block reads them."""

    def __init__(self, lora: Lora, estimator: Estimator, probe: Probe):
        self.pairs, self.estimator, self.probe = lora.pairs, estimator, probe

    def __getitem__(self, name: str) -> Pair:
        pair = self.pairs[name]
        if self.probe.amount == 0:
            return pair
        m = None if pair.m is None else self._moved(pair.m, f"{name}.m")
        return Pair(self._moved(pair.a, f"{name}.lora_a"), self._moved(pair.b, f"{name}.lora_b"), m)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def _moved(self, value: mx.array, name: str) -> mx.array:
        return value + self.probe.amount * self.estimator.direction(self.probe.number, name, value.shape)


def perturbed(lora: Lora, estimator: Estimator, probe: Probe) -> Adapter:
    """A Lora perturbed by a probe."""
    return Adapter(Perturbed(lora, estimator, probe), lora.scale, lora.dropout)


class ZerothOrderEngine:
    """The engines `mezo`, `kzoo`, `hizoo` and `fzoo`: the footprint of a forward pass, several times a step.

    total: sums a step's losses, float64, one per probe, over the run's machines; nothing else is exchanged.
    """

    def __init__(
        self,
        model: Model,
        lora: Lora,
        estimator: Estimator,
        *,
        plan: Plan | None = None,
        seed: int = 0,
        total: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ):
        self.model, self.lora, self.estimator, self.seed, self.total = model, lora, estimator, seed, total
        self.plan = plan or Plan()
        self.barrier = Barrier(self.plan.grain)
        self._losses = np.zeros(0)  # sums over the step so far, one for each probe
        self._n_seen, self._done = 0, False

    def reserve(self, batch_size: int, n_tokens: int) -> None:
        """Does nothing: no activation is kept."""

    def step(self, batch: TokenBatch, *, step: int, micro: int, n_labels: int, sink: Sink) -> float:
        """The batch's share of the step's loss. After a step's last micro-batch, the estimate goes to `sink` block by
        block: all micro-batches use the same directions, and an estimate need not be a sum over them.
        """
        if micro == 0:
            self.estimator.begin(step)
            self._losses, self._n_seen, self._done = np.zeros(len(self.estimator.probes)), 0, False
        # All passes draw the same dropout masks: loss differences must come from the direction alone.
        dropout = (first_row(batch), self.seed, step, micro)
        shares = np.zeros(len(self.estimator.probes))
        for number, probe in enumerate(self.estimator.probes):
            adapter = perturbed(self.lora, self.estimator, probe)
            loss_sum = Pass(self.model, self.plan, adapter, self.barrier, dropout).loss(batch).loss_sum
            shares[number] = loss_sum / max(n_labels, 1)
            if not math.isfinite(shares[number]):
                raise NonFiniteLoss(f"loss is {shares[number]}")
        self._losses += shares
        self._n_seen += batch.n_labels
        if self._n_seen >= n_labels and not self._done:  # a batch without labels may still follow
            self._done = True
            self._hand_over(sink)
        return self.estimator.loss(shares)

    def evaluate(self, batch: TokenBatch) -> Evaluation:
        """A forward pass at theta itself, without dropout."""
        return Pass(self.model, self.plan, self.lora, self.barrier).loss(batch)

    def close(self) -> None:
        """Nothing to free."""

    def _hand_over(self, sink: Sink) -> None:
        self.estimator.observe(self.total(self._losses))
        # Keep only shapes: references to the old arrays would delay their release.
        shapes = {name: value.shape for name, value in self.lora.parameters().items()}
        for layer in reversed(self.model.spec.layers):
            names = [name for name in shapes if name.startswith(f"{layer.prefix}.")]
            estimate = {name: self.estimator.gradient(name, shapes[name]) for name in names}
            self.barrier.value(*estimate.values())
            if estimate:
                self.barrier.tile(*(sink(estimate) or []))
                self.barrier.block()
        self.barrier.finish()


def make_estimator(  # noqa: PLR0913 - the options of four estimators, by keyword
    name: str,
    lora: Lora,
    *,
    seed: int,
    eps: float,
    n_seeds: int = 4096,
    pro: bool = False,
    alpha: float = 1e-8,
    n_samples: int = 8,
) -> Estimator:
    """The estimator of an engine ("mezo", "kzoo", "hizoo", "fzoo"); ValueError for another name."""
    if name == "mezo":
        return Estimator(seed, eps)
    if name == "kzoo":
        return SeedPool(seed, eps, n_seeds, pro)
    if name == "hizoo":
        return Curvature(seed, eps, alpha, lora.parameters())
    if name == "fzoo":
        return Normalized(seed, eps, n_samples)
    raise ValueError(f"unknown zeroth-order engine {name!r}")


def rebuild(start: Mapping[str, mx.array], sums: np.ndarray, seed: int, learning_rate: float) -> dict[str, mx.array]:
    """K-ZOO's trained parameters from the initial ones and K numbers: theta_0 - rate * sum_k sums_k z_k.

    start: initial parameters by name; sums: SeedPool's, float32 [K]. Holds for plain SGD at a constant rate.
    """
    parameters = dict(start)
    for name in parameters:
        for index in np.flatnonzero(sums):
            amount = learning_rate * float(sums[index])
            parameters[name] = parameters[name] - amount * pool_noise(seed, int(index), name, parameters[name].shape)
            mx.eval(parameters[name])
    return parameters


def gaussian(noise_parts: tuple[int, ...], name: str, shape: tuple[int, ...]) -> mx.array:
    """The noise of one parameter: standard normal, the same at every call."""
    return mx.random.normal(shape, key=random_key("noise", *noise_parts, name))


def pool_noise(seed: int, index: int, name: str, shape: tuple[int, ...]) -> mx.array:
    """Noise number `index` of a pool."""
    return mx.random.normal(shape, key=random_key("pool", seed, index, name))


def signs(noise_parts: tuple[int, ...], name: str, shape: tuple[int, ...]) -> mx.array:
    """Rademacher noise: +1 or -1, equally likely."""
    drawn = mx.random.bernoulli(0.5, shape, random_key("signs", *noise_parts, name))
    return 2 * drawn.astype(mx.float32) - 1
