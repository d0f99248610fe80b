"""A save: the checkpoint, the adapters, best/, then the log's event. A resumed run completes an interrupted save."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from ..config import TrainConfig
from ..engine.zeroth_order import Estimator
from ..export.adapters import ADAPTER_CONFIG, ADAPTERS, numbered, save_adapters
from ..model.lora import Lora
from ..system.units import megabytes
from .best import FOLDER as BEST
from .best import Best
from .checkpoint import Checkpoint, save_checkpoint
from .folder import make_folder
from .log import RunLog, last_event
from .update import Updater

_EVENT_BYTES = 300  # size of a line in the log


def is_due(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]."""
    return now // every > before // every


class Saver:
    """Writes a run's state into its folder. fingerprints: as in Checkpoint; best: saved with every state; the adapters
    are also saved in best/ if the best validation is that of the saved state.
    """

    def __init__(self, folder: Path, config: TrainConfig, fingerprints: dict[str, str], lora: Lora, best: Best) -> None:
        self.folder, self.config, self.fingerprints, self.lora, self.best = folder, config, fingerprints, lora, best

    def save(self, step: int, updater: Updater, estimator: Estimator | None, log: RunLog) -> None:
        """Saves the state after `step` updates. Raises NonFiniteLoss if a value is not finite."""
        started_s = time.perf_counter()
        state = Checkpoint(
            self.lora.parameters(),
            updater.state(),
            step,
            self.config.to_dict(),
            self.fingerprints,
            {} if estimator is None else estimator.state(),
            self.best.state() if self.config.tracks_best else {},
        )
        save_checkpoint(self.folder, state)
        self._adapters(step)
        log.event("save", iter=self.config.iteration(step), step=step, seconds=time.perf_counter() - started_s)

    def complete(self, step: int, log: RunLog) -> None:
        """Writes the missing parts of the save after `step` updates, from the checkpoint's parameters in `lora`."""
        if not is_whole(self.folder, self.config, step, self.best):
            self._adapters(step)
        iteration = self.config.iteration(step)
        if (last_event(self.folder, "save") or {}).get("iter") != iteration:
            log.event("save", iter=iteration, step=step, seconds=0.0)

    def _adapters(self, step: int) -> None:
        about = {"model": self.config.model, "data": self.config.data_source, "seed": self.config.seed}
        copy = _has_copy(self.config, step)
        save_adapters(self.folder, self.lora, self.config.iteration(step), about, copy)
        if _is_best(self.config, step, self.best):
            make_folder(self.folder / BEST)
            save_adapters(self.folder / BEST, self.lora, self.config.iteration(step), about)


def space_notice(folder: Path, config: TrainConfig, lora: Lora, state: Any, iterations: range) -> str | None:
    """A warning if the folder's disk has too little space for what these iterations will write; otherwise None.

    state: the optimizer's. A new file is complete before it replaces the old. The arena's space is already reserved.
    """
    lora_bytes = sum(value.nbytes for value in lora.parameters().values())
    flat: list[tuple[str, Any]] = tree_flatten(state)  # type: ignore[assignment]
    checkpoint_bytes = lora_bytes + sum(value.nbytes for _, value in flat)
    n_copies = iterations.stop // config.save_every - iterations.start // config.save_every
    log_bytes = _EVENT_BYTES * (len(iterations) // config.steps_per_report + len(iterations) // config.steps_per_eval)
    needed_bytes = (n_copies + 2 + config.tracks_best) * lora_bytes + 2 * checkpoint_bytes + log_bytes
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes <= free_bytes:
        return None
    return (
        f"--adapter-path {folder}: the run needs {megabytes(needed_bytes)} of disk space ({n_copies} copies of the "
        f"adapters, {megabytes(lora_bytes)} each; checkpoint {megabytes(checkpoint_bytes)}), "
        f"{megabytes(free_bytes)} is free; a larger --save-every makes fewer copies"
    )


def is_whole(folder: Path, config: TrainConfig, step: int, best: Best) -> bool:
    """Whether all adapter files of the save after `step` updates exist; adapter_config.json is written last."""
    iteration = config.iteration(step)
    names = [ADAPTERS, *([numbered(iteration)] if _has_copy(config, step) else [])]
    if _is_best(config, step, best):
        names.append(f"{BEST}/{ADAPTERS}")
        if _saved_iteration(folder / BEST) != iteration:
            return False
    return _saved_iteration(folder) == iteration and all((folder / name).exists() for name in names)


def _is_best(config: TrainConfig, step: int, best: Best) -> bool:
    """Whether best/ has to contain the state after `step` updates."""
    return config.tracks_best and step > 0 and best.iteration == config.iteration(step)


def _has_copy(config: TrainConfig, step: int) -> bool:
    """Whether the save after `step` updates includes a numbered copy of the adapters."""
    return is_due(config.save_every, config.iteration(step - 1), config.iteration(step))


def _saved_iteration(folder: Path) -> Any:
    try:
        return json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("iters")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
