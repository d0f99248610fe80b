"""Makes an optimizer of mlx.optimizers from its name, with its learning-rate schedule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mebp_mlx.config import OPTIMIZERS, TrainConfig
from mebp_mlx.errors import UserError
from mebp_mlx.options import suggest

Schedule = Callable[[mx.array], mx.array]


class PlainSGD(optim.SGD):
    """SGD without momentum and without state; mlx's own keeps an array of zeros for each parameter."""

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        """Creates no state."""


# mlx.optimizers' classes by lower-case name; config.OPTIMIZERS lists the supported ones.
_CLASSES = {name.lower(): value for name, value in vars(optim).items() if isinstance(value, type)}
CLASSES: dict[str, type[optim.Optimizer]] = {name: _CLASSES[name] for name in OPTIMIZERS}


def make_optimizer(config: TrainConfig, n_updates: int) -> optim.Optimizer:
    """The optimizer for a run of `n_updates` updates. Raises UserError for wrong arguments in optimizer_config."""
    name = config.optimizer_name
    arguments = dict(config.optimizer_config.get(name, {}))
    known = set(inspect.signature(CLASSES[name].__init__).parameters) - {"self", "learning_rate"}
    if unknown := sorted(arguments.keys() - known):
        raise UserError(f"optimizer_config.{name}.{unknown[0]}: unknown argument{suggest(unknown[0], known)}")
    kind = PlainSGD if name == "sgd" and not arguments.get("momentum") else CLASSES[name]
    if config.lora_plus_ratio != 1:
        kind = with_ratio(kind)
    rate = learning_rate(config, n_updates)
    try:
        if arguments:  # the classes check little, so try the arguments in one update of a temporary optimizer
            tried = kind(learning_rate=1e-3, **arguments)  # type: ignore[call-arg]
            mx.eval(tried.apply_gradients({"w": mx.ones((2, 2))}, {"w": mx.ones((2, 2))}))
        optimizer = kind(learning_rate=rate, **arguments)  # type: ignore[call-arg]
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        raise UserError(f"optimizer_config.{name}: {error}") from None
    if config.lora_plus_ratio != 1 and not uses_learning_rate(optimizer):
        raise UserError(
            f"--lora-plus-ratio: {name} sets its own step sizes; relative_step: false makes it use the learning rate"
        )
    return optimizer


def with_ratio(kind: type[optim.Optimizer]) -> type[optim.Optimizer]:
    """A subclass of the optimizer whose learning rate is `ratio` times its set value: LoRA+ (Hayou et al. 2024)."""

    class WithRatio(kind):  # type: ignore[misc, valid-type]
        ratio = 1.0

        @property
        def learning_rate(self) -> mx.array:
            return self.state["learning_rate"] * self.ratio

        @learning_rate.setter
        def learning_rate(self, rate: float | mx.array) -> None:
            self.state["learning_rate"] = mx.array(rate)

    return WithRatio


def state_bytes(optimizer: Any) -> int:
    """Bytes of an initialised optimizer's state."""
    flat: list[tuple[str, Any]] = tree_flatten(optimizer.state)  # type: ignore[assignment]
    return sum(int(value.nbytes) for _, value in flat if isinstance(value, mx.array))


def uses_learning_rate(optimizer: Any) -> bool:
    """Whether an optimizer uses the learning rate; adafactor sets its own step sizes by default."""
    return not getattr(optimizer, "relative_step", False)


def learning_rate(config: TrainConfig, n_updates: int) -> float | Schedule:
    """The rate as a number, or as a function of the number of updates done (0 before the first)."""
    if config.lr_schedule is not None:
        return _from_mlx_lm(config.lr_schedule, n_updates)
    peak, warmup = config.learning_rate, config.warmup
    n_decay = max(1, n_updates - warmup)
    if config.lr_decay == "cosine":
        decay: float | Schedule = optim.cosine_decay(peak, n_decay)
    elif config.lr_decay == "linear":
        decay = optim.linear_schedule(peak, 0.0, n_decay)
    else:
        decay = peak
    if not warmup:
        return decay
    # Warm-up starts at peak / (warmup + 1): an update at rate 0 would waste a step.
    rise = optim.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optim.join_schedules([rise, decay if callable(decay) else lambda _: mx.array(peak)], [warmup])


def _from_mlx_lm(schedule: Mapping[str, Any], n_updates: int) -> Schedule:
    """mlx-lm's `lr_schedule`: `warmup` updates from `warmup_init` to the first argument, then the schedule.

    Raises UserError if the rate at the start or after `n_updates` updates is not finite or is negative.
    """
    numbers = [int(n) if float(n).is_integer() and n >= 1 else n for n in schedule["arguments"]]
    try:
        main = getattr(optim.schedulers, schedule["name"])(*numbers)
        rates = [main(mx.array(step)).item() for step in (0, 1, min(n_updates, 2**31 - 1))]
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"lr_schedule.arguments: {error}") from None
    if not all(-1e-6 <= rate < math.inf for rate in rates):  # a linear decay to 0 may end slightly below
        raise UserError(f"lr_schedule.arguments: give rates of {rates[0]:g} at the start, {rates[-1]:g} at the end")
    if not (warmup := schedule["warmup"]):
        return main
    rise = optim.linear_schedule(schedule["warmup_init"], numbers[0], warmup)
    return optim.join_schedules([rise, main], [warmup + 1])
