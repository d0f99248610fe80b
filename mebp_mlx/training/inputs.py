"""The inputs of a run: rows, the saved state if it is resumed, and the number of updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..data.dataset import DataSets, TokenRows, n_batches_per_epoch, prepare
from ..errors import UserError
from ..export.start import start_file
from ..model.reading import read_config
from ..system.group import Group
from . import folder as run_folder
from .checkpoint import Checkpoint, check_same_run, load_checkpoint
from .distributed import Deal
from .fingerprint import data_fingerprint, model_fingerprint
from .report import print_data
from .services import check_installed
from .setup import Sizes


@dataclass
class Inputs:
    """The inputs, read and checked before a model is opened.

    fingerprints: of "model" and "data"; n_updates: of the whole run; first_step: updates already done; saved: the state
    after them, None for a new run and after its arrays were restored.
    """

    model_path: Path
    data: DataSets
    fingerprints: dict[str, str]
    n_updates: int
    first_step: int
    saved: Checkpoint | None

    def compared(self, config: TrainConfig, group: Group) -> dict[str, Any]:
        """The values that must be equal on every machine, by option name."""
        splits = [] if group.is_alone else [split for split in self.data.counts if split != "train"]
        evaluated = {f"--data ({split}.jsonl)": data_fingerprint(self.data.cache_dir, split) for split in splits}
        model, data = ({f"--{name}": self.fingerprints[name]} for name in ("model", "data"))
        return {**model, **data, **evaluated, "--iters": self.n_updates, "--resume": self.first_step}

    def sizes(self, config: TrainConfig, deal: Deal) -> Sizes:
        """The sizes of the largest batches of this machine's rows."""
        train, evaluated = self.data.train, (self.data.valid, self.data.test if config.test else None)
        longest_evaluated = max((int(rows.lengths.max()) - 1 for rows in evaluated if rows is not None), default=0)
        n_rows, longest = min(deal.most_rows, len(train)), int(train.lengths.max()) - 1
        return Sizes(n_rows, longest, longest_evaluated, deal.group.size)


def read_inputs(config: TrainConfig, model_path: Path) -> Inputs:
    """Reads and checks the inputs. Raises UserError for everything that can be wrong before a model is opened."""
    folder = Path(config.adapter_path)
    saved = load_checkpoint(folder) if config.resume else None
    if saved is None and not (config.dry_run or config.preview):
        run_folder.check_unused(folder)
    if saved is None and config.resume_adapter_file is not None:
        start_file(config.resume_adapter_file)
    read_config(model_path)  # checks its sizes before any library uses them
    check_installed(config.report_to or ())
    data = prepare(config.data_source, model_path, config.row_options)
    print_data(data, config)
    if config.test and data.test is None:
        raise UserError(f"--test: {config.data} has no test.jsonl")
    if config.patience is not None and (data.valid is None or not config.val_batches):
        raise UserError("--patience: no validation is run (needs valid.jsonl and --val-batches)")
    fingerprints = {"model": model_fingerprint(model_path), "data": data_fingerprint(data.cache_dir)}
    if saved is not None:
        check_same_run(config, saved, fingerprints)
    first_step = 0 if saved is None else saved.step
    return Inputs(model_path, data, fingerprints, count_updates(config, data.train), first_step, saved)


def count_updates(config: TrainConfig, rows: TokenRows) -> int:
    """The number of complete optimizer updates of the run: --iters 10 with 4 micro-batches per update makes 2."""
    accumulate = config.grad_accumulation_steps
    if config.epochs is not None:
        return math.ceil(config.epochs * n_batches_per_epoch(rows, config.batch_size) / accumulate)
    if config.iters < accumulate:
        raise UserError(f"--iters: {config.iters} is less than one update of --grad-accumulation-steps {accumulate}")
    return config.iters // accumulate
