"""Prepares a run for its first step: reads and checks inputs, opens the model, plans within the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import TrainConfig
from ..data.dataset import has_tokenizer
from ..data.preview import show_rows
from ..engine.zeroth_order import Estimator
from ..model.base import Model
from ..model.lora import Lora
from ..model.opening import open_model
from ..planner.projection import impose
from ..planner.search import Planned
from ..system.footprint import footprint_bytes
from ..system.group import Group
from ..system.machine import machine
from ..system.units import megabytes
from ..weights.hub import resolve_model
from . import folder as run_folder
from .best import Best
from .checkpoint import restore
from .distributed import Deal, check_alike
from .inputs import Inputs, read_inputs
from .log import last_event
from .optimizers import make_optimizer
from .saving import is_whole
from .setup import estimator_of, make_lora, make_plan, make_updater, plan_without_data
from .update import Updater


def prepare_run(config: TrainConfig, group: Group | None = None) -> Run | None:
    """Reads and checks the inputs, opens the model, and plans within the budget. Writes nothing.

    Returns None if there is nothing to train: a dry run, or a resumed run that has done all of its iterations. Raises
    UserError, BudgetError.
    """
    group = group or Group()
    here = machine()
    print(f"backend    MLX {here['mlx']} on {mx.default_device().type.name}, BLAS {here['blas']}", flush=True)
    model_path = resolve_model(config.model)
    if config.dry_run and not has_tokenizer(model_path):
        plan_without_data(config, model_path)
        return None
    inputs = read_inputs(config, model_path)
    check_alike(group, inputs.compared(config, group))
    if config.preview:
        show_rows(inputs.data.train, model_path, config.preview)
    if config.preview or group.first(_is_done(config, inputs) if group.is_first else None):
        return None
    before_model_bytes = footprint_bytes()
    print(f"footprint  {megabytes(before_model_bytes)} before the model is opened")
    model = open_model(model_path, config.dtype, config.weights)
    if config.phone is not None:
        print(impose(config.phone, config.budget_bytes))
    if config.keys is None:  # so that run.json lists them
        config = config.replace(keys=model.spec.lora_keys)
    lora = make_lora(config, model)
    optimizer = make_optimizer(config, inputs.n_updates)
    estimator = estimator_of(config, lora)
    best = Best.of(config, None if inputs.saved is None else inputs.saved.best)
    if inputs.saved is not None:
        restore(inputs.saved, lora, optimizer, estimator)
        inputs.saved = None  # its arrays belong to lora and optimizer now
    known = run_folder.recorded_plan(Path(config.adapter_path)) if config.resume else None
    deal = Deal(group, config.batch_size, config.rows_by_speed)
    planned = make_plan(config, model, lora, inputs.sizes(config, deal), estimator, known)
    group.gather(None)  # another machine may have found its budget too small
    if config.dry_run:
        return None
    updater = make_updater(config, lora, None if planned is None else planned.plan, optimizer, group)
    return Run(config, inputs, model, lora, estimator, planned, updater, best, before_model_bytes, here, deal)


def _is_done(config: TrainConfig, inputs: Inputs) -> bool:
    """Whether a resumed run has nothing left to do; if so, prints that."""
    step, iteration = inputs.first_step, config.iteration(inputs.first_step)
    folder = Path(config.adapter_path)
    if inputs.saved is None or not is_whole(folder, config, step, best := Best.of(config, inputs.saved.best)):
        return False
    if step < inputs.n_updates and not best.is_exhausted:
        return False
    events = ["save", *(["test"] if config.test else []), *(["end"] if step >= inputs.n_updates else [])]
    if any((last_event(folder, event) or {}).get("iter") != iteration for event in events):
        return False  # the disk was full, or the process was killed, after the last save
    if step < inputs.n_updates:
        print(f"nothing to do: the run in {folder} has stopped early: {best}; a larger --patience continues it")
        return True
    print(
        f"nothing to do: the run in {folder} has done {iteration} iterations of "
        f"{config.iteration(inputs.n_updates)}; a larger --iters continues it"
    )
    return True


@dataclass
class Run:
    """The parts of a run before its first step. planned: None for an engine without a plan; machine: its description;
    deal: the division of rows among machines; callbacks: as in callbacks.sender.
    """

    config: TrainConfig
    inputs: Inputs
    model: Model
    lora: Lora
    estimator: Estimator | None
    planned: Planned | None
    updater: Updater
    best: Best
    before_model_bytes: int
    machine: dict[str, Any]
    deal: Deal
    callbacks: Sequence[Any] = ()

    @property
    def group(self) -> Group:
        """The machines that share the work."""
        return self.deal.group

    @property
    def folder(self) -> Path:
        """The folder of all files that the run writes."""
        return Path(self.config.adapter_path)

    @property
    def optimizer(self) -> Any:
        """The optimizer of mlx.optimizers that applies gradients."""
        return self.updater.optimizer

    @property
    def n_iters(self) -> int:
        """The run's last iteration."""
        return self.config.iteration(self.inputs.n_updates)

    @property
    def n_parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(value.size for value in self.lora.parameters().values())
