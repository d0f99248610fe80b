"""The best validation so far, and whether enough of them in a row were no better: --save-best and --patience."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import TrainConfig

FOLDER = "best"  # of its adapters, inside the run's


@dataclass
class Best:
    """loss, iteration: of the best validation, infinite and 0 before the first; n_since: validations after it.

    A validation is better when its loss is lower by more than min_delta. That of iteration 0 is only the one to beat:
    nothing is trained then. patience: so many in a row that are no better end the run, None: they never do.
    """

    min_delta: float = 0.0
    patience: int | None = None
    loss: float = math.inf
    iteration: int = 0
    n_since: int = 0

    @classmethod
    def of(cls, config: TrainConfig, state: Mapping[str, Any] | None) -> Best:
        """As the options say, continued from what state() gave; None: from the start."""
        best = cls(config.min_delta, config.patience)
        if state:
            best.loss, best.iteration, best.n_since = state["loss"], state["iteration"], state["n_since"]
        return best

    def state(self) -> dict[str, Any]:
        """What a resumed run needs; {} before the first validation."""
        if math.isinf(self.loss):
            return {}
        return {"loss": self.loss, "iteration": self.iteration, "n_since": self.n_since}

    def observe(self, loss: float, iteration: int) -> bool:
        """Takes a validation; whether it is better than all before it."""
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
