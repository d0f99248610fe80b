"""Builds a run's parts from its options: LoRA parameters, estimator, updater and a plan within the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import UNLIMITED, ZEROTH_ORDER, TrainConfig
from ..engine.zeroth_order import Estimator, make_estimator
from ..errors import BudgetError, UserError
from ..export.start import start_file, start_from
from ..model.base import Model
from ..model.lora import Lora, init_lora
from ..model.opening import open_model
from ..ops.plan import Plan
from ..planner.projection import project
from ..planner.search import Planned, choose
from ..planner.sizes import lora_sizes
from ..planner.workload import Workload
from ..system.footprint import footprint_bytes
from ..system.group import Group
from ..system.limits import process_limit
from ..system.machine import memory_bytes
from .optimizers import make_optimizer
from .report import print_plan
from .update import Updater

_SUMS = 4  # copies of a block's gradients in transit: the sent array and its sum, for two blocks


@dataclass(frozen=True)
class Sizes:
    """batch_size: rows of a batch; longest: positions of the longest training row; longest_evaluated: positions of the
    longest validation or test row; n_machines: the number of machines whose gradients are summed.
    """

    batch_size: int
    longest: int
    longest_evaluated: int = 0
    n_machines: int = 1


def make_lora(config: TrainConfig, model: Model) -> Lora:
    """The initial LoRA parameters of a run. Raises BudgetError, before allocating any, if they do not fit."""
    check_lora(config, model)
    lora = init_lora(
        model.spec,
        rank=config.rank,
        scale=config.lora_scale,
        dropout=config.dropout,
        keys=config.keys,
        num_layers=config.num_layers,
        seed=config.seed,
        lengths=model.row_lengths if is_dora(config) else None,
    )
    if config.resume_adapter_file is not None and not config.resume:
        start_from(start_file(config.resume_adapter_file), lora, model.spec)
    return lora


def is_dora(config: TrainConfig) -> bool:
    """Whether the pairs also have row norms."""
    return config.fine_tune_type == "dora"


def check_lora(config: TrainConfig, model: Model) -> None:
    """Raises BudgetError if LoRA parameters, gradients and state alone exceed the budget or the machine's memory.

    Uses sizes only; nothing is allocated.
    """
    optimizer = make_optimizer(config, 1)
    sizes = lora_sizes(model.spec, config.keys, config.num_layers, config.rank, optimizer, is_dora(config))
    gathers = config.grad_accumulation_steps > 1 or config.max_grad_norm is not None or config.engine == "whole-graph"
    gradients = sizes.parameters if gathers else sizes.block_gradients
    state = sizes.state + (sizes.parameters if config.engine == "hizoo" else 0)
    offloads = config.engine == "mebp"
    needed = footprint_bytes() + sizes.parameters + gradients + (0 if offloads else state)
    room = {f"the machine's memory is {memory_bytes() / 1e6:,.1f} MB": memory_bytes()}
    if (limit := process_limit()) is not None:
        room[str(limit)] = limit.footprint_bytes
    if config.budget_bytes is not None:
        room[f"--memory-budget is {config.budget_bytes / 1e6:,.1f} MB"] = config.budget_bytes
    what, least = min(room.items(), key=lambda entry: entry[1])
    if needed > least:
        raise BudgetError(
            f"--rank {config.rank}: LoRA takes {sizes.parameters / 1e6:,.1f} MB, gradients {gradients / 1e6:,.1f} MB, "
            f"optimizer state {state / 1e6:,.1f} MB{' on disk' if offloads else ''}; {what}, "
            f"the smallest workable budget is above {math.ceil(needed / 1e6)}MB"
        )


def estimator_of(config: TrainConfig, lora: Lora) -> Estimator | None:
    """The estimator of a zeroth-order engine, as the options describe it; None for exact gradients."""
    if config.engine not in ZEROTH_ORDER:
        return None
    return make_estimator(
        config.engine,
        lora,
        seed=config.seed,
        eps=config.zo_eps,
        n_seeds=config.kzoo_seeds,
        pro=config.kzoo_pro,
        alpha=config.hizoo_alpha,
        n_samples=config.fzoo_samples,
    )


def make_updater(
    config: TrainConfig, lora: Lora, plan: Plan | None, optimizer: Any | None = None, group: Group | None = None
) -> Updater:
    """The updater that options and plan describe. optimizer: with its state, None for a new one; group: the machines
    whose gradients are summed (not with a zeroth-order engine, whose estimate is the same on all of them).
    """
    accumulate = config.grad_accumulation_steps
    return Updater(
        optimizer or make_optimizer(config, max(1, config.iters // accumulate)),
        lora,
        max_grad_norm=config.max_grad_norm,
        gather=accumulate > 1,
        park=plan is not None and plan.offload_state and config.engine == "mebp",
        is_lazy=plan is not None and plan.is_lazy,
        in_place=config.engine == "mebp",
        b_ratio=config.lora_plus_ratio,
        arena_dir=config.arena_dir,
        group=None if config.engine in ZEROTH_ORDER else group,
    )


def make_plan(
    config: TrainConfig, model: Model, lora: Lora, sizes: Sizes, estimator: Estimator | None, known: Plan | None = None
) -> Planned | None:
    """Chooses and prints a plan; None for an engine without a plan.

    estimator: its arrays are already allocated; known: the plan of the resumed run, reused if it fits, because other
    block sizes change the last bits. Raises BudgetError naming the smallest workable budget.
    """
    if config.engine == "whole-graph":
        if config.memory_budget not in (None, UNLIMITED) or config.phone is not None or config.dry_run:
            flags = "--memory-budget, --device, --dry-run"
            raise UserError(f"{flags}: not available with --engine whole-graph, which has no plan")
        return None
    optimizer = make_optimizer(config, 1)
    lora_and_state = lora_sizes(model.spec, config.keys, config.num_layers, config.rank, optimizer, is_dora(config))
    workload = Workload(
        model,
        lora,
        sizes.batch_size,
        sizes.longest,
        sizes.longest_evaluated,
        make_updater=lambda part, plan: make_updater(config, part, plan),
        state_bytes=lora_and_state.state,
        gathers=config.max_grad_norm is not None or config.grad_accumulation_steps > 1,
        estimator=estimator,
        travelling_bytes=_SUMS * lora_and_state.block_gradients if sizes.n_machines > 1 else 0,
    )
    budget_bytes, limit = config.budget_bytes, process_limit()
    if limit is not None and (budget_bytes is None or limit.footprint_bytes < budget_bytes):
        budget_bytes = limit.footprint_bytes
    else:
        limit = None
    try:
        planned = choose(
            workload,
            budget_bytes,
            smallest=config.smallest,
            arena_budget_bytes=config.arena_budget,
            known=known,
            arena_dir=config.arena_dir,
        )
    except BudgetError as error:
        raise BudgetError(f"{error}; {limit}" if limit is not None else str(error)) from None
    print_plan(config, planned, table=config.dry_run)
    if config.phone is not None and config.dry_run:
        print("\n".join(project(config.phone, workload, planned.plan)))
    return planned


def plan_without_data(config: TrainConfig, model_path: Path) -> None:
    """The dry run for a model without a tokenizer, on rows of --max-seq-length tokens."""
    print(
        f"data       not read: {model_path} contains no tokenizer; planned for {config.batch_size} rows of "
        f"{config.max_seq_length:,} tokens"
    )
    model = open_model(model_path, config.dtype, config.weights)
    lora = make_lora(config, model)
    longest = config.max_seq_length - 1  # the last token is only a label
    sizes = Sizes(config.batch_size, longest, longest)
    make_plan(config, model, lora, sizes, estimator_of(config, lora))
