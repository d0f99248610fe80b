"""A save: the checkpoint first, then the adapters, then the log's event. What a stop cut off is completed later."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..engine.zeroth_order import Estimator
from ..export.adapters import ADAPTER_CONFIG, ADAPTERS, numbered, save_adapters
from ..model.lora import Lora
from .checkpoint import Checkpoint, save_checkpoint
from .log import RunLog, last_event
from .update import Updater


def is_due(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]."""
    return now // every > before // every


class Saver:
    """Writes a run's state into its folder. fingerprints: as of Checkpoint."""

    def __init__(self, folder: Path, config: TrainConfig, fingerprints: dict[str, str], lora: Lora) -> None:
        self.folder, self.config, self.fingerprints, self.lora = folder, config, fingerprints, lora

    def save(self, step: int, updater: Updater, estimator: Estimator | None, log: RunLog) -> None:
        """The state after `step` updates. Refuses one that is not finite (NonFiniteLoss)."""
        started_s = time.perf_counter()
        state = Checkpoint(
            self.lora.parameters(),
            updater.state(),
            step,
            self.config.to_dict(),
            self.fingerprints,
            {} if estimator is None else estimator.state(),
        )
        save_checkpoint(self.folder, state)
        self._adapters(step)
        log.event("save", iter=self._iteration(step), step=step, seconds=time.perf_counter() - started_s)

    def complete(self, step: int, log: RunLog) -> None:
        """Writes what is missing of the save after `step` updates, from the checkpoint's parameters in `lora`."""
        if not is_whole(self.folder, self.config, step):
            self._adapters(step)
        iteration = self._iteration(step)
        if (last_event(self.folder, "save") or {}).get("iter") != iteration:
            log.event("save", iter=iteration, step=step, seconds=0.0)

    def _iteration(self, step: int) -> int:
        return step * self.config.grad_accumulation_steps

    def _adapters(self, step: int) -> None:
        about = {"model": self.config.model, "data": self.config.data_source, "seed": self.config.seed}
        copy = _has_copy(self.config, step)
        save_adapters(self.folder, self.lora, self._iteration(step), about, copy)


def is_whole(folder: Path, config: TrainConfig, step: int) -> bool:
    """Whether the adapters of the save after `step` updates are all there; adapter_config.json is written last."""
    iteration = step * config.grad_accumulation_steps
    names = [ADAPTERS, *([numbered(iteration)] if _has_copy(config, step) else [])]
    return _saved_iteration(folder) == iteration and all((folder / name).exists() for name in names)


def _has_copy(config: TrainConfig, step: int) -> bool:
    """Whether the iteration's own copy of the adapters is due."""
    iteration = step * config.grad_accumulation_steps
    return is_due(config.save_every, iteration - config.grad_accumulation_steps, iteration)


def _saved_iteration(folder: Path) -> Any:
    try:
        return json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("iters")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
