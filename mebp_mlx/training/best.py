"""The best validation so far, and when to stop for lack of improvement: --save-best and --patience."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import TrainConfig

FOLDER = "best"  # of the best adapters, inside the run's folder


@dataclass
class Best:
    """loss, iteration: of the best validation, infinite and 0 before the first; n_since: validations after it.

    A validation is better if its loss is lower by more than min_delta. Iteration 0 only sets the loss to beat: nothing
    is trained yet. patience: the number of validations in a row without improvement that ends the run; None: no limit.
    """

    min_delta: float = 0.0
    patience: int | None = None
    loss: float = math.inf
    iteration: int = 0
    n_since: int = 0

    @classmethod
    def of(cls, config: TrainConfig, state: Mapping[str, Any] | None) -> Best:
        """The Best for these options. state: a result of state() to continue from; None: start anew."""
        best = cls(config.min_delta, config.patience)
        if state:
            best.loss, best.iteration, best.n_since = state["loss"], state["iteration"], state["n_since"]
        return best

    def state(self) -> dict[str, Any]:
        """The values that a resumed run needs; {} before the first validation."""
        if math.isinf(self.loss):
            return {}
        return {"loss": self.loss, "iteration": self.iteration, "n_since": self.n_since}

    def observe(self, loss: float, iteration: int) -> bool:
        """Records a validation; returns whether it is the best so far."""
        if not loss < self.loss - self.min_delta:
            self.n_since += 1
            return False
        self.loss, self.iteration, self.n_since = loss, iteration, 0
        return True

    @property
    def is_exhausted(self) -> bool:
        """Whether the run has to end."""
        return self.patience is not None and self.n_since >= self.patience

    def __str__(self) -> str:
        delta = f" by more than {self.min_delta:g}" if self.min_delta else ""
        known = f"iteration {self.iteration}'s, {self.loss:.3f}"
        return f"{self.n_since} validations in a row were not better{delta} than {known}"
