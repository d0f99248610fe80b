"""From options to a plan: what is trained on which batches, inside which budgets; and a dry run without data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mebp_mlx

from .config import UNLIMITED, ZEROTH_ORDER, TrainConfig
from .data import has_tokenizer
from .engine.choose import _ever_smaller, choose_plan
from .engine.job import Job, job_for
from .engine.parking import parked_bytes
from .engine.plan import Plan
from .engine.predict import Prediction, predict
from .engine.update import Updater
from .engine.zeroth_order import Estimator, make_estimator
from .errors import BudgetError, UserError
from .model.frozen import Model
from .model.lora import Lora
from .optimizers import make_optimizer, state_bytes
from .planner.sizes import lora_sizes
from .proxy import project
from .runtime.footprint import footprint_bytes
from .runtime.limits import process_limit
from .runtime.platform import memory_bytes
from .summary import print_plan


@dataclass(frozen=True)
class Sizes:
    """batch_size: rows of a batch; longest: positions of its longest row; longest_evaluated: of one only evaluated."""

    batch_size: int
    longest: int
    longest_evaluated: int = 0


@dataclass(frozen=True)
class Planned:
    """A plan with its prediction; budget_bytes: if there is one; forward_passes: of a zeroth-order step."""

    job: Job
    plan: Plan
    predicted: Prediction
    budget_bytes: int | None
    forward_passes: int = 1


def make_lora(config: TrainConfig, model: Model) -> Lora:
    """Fresh trainable parameters as the options say. BudgetError, before they are made, when there is no room."""
    check_lora(config, model)
    return mebp_mlx.init_lora(
        model,
        rank=config.rank,
        scale=config.scale,
        dropout=config.dropout,
        keys=config.keys,
        num_layers=config.num_layers,
        seed=config.seed,
    )


def check_lora(config: TrainConfig, model: Model) -> None:
    """Refuses LoRA parameters that alone, with what a step holds beside them, pass the budget or the machine.

    Sizes only, nothing is allocated. Raises BudgetError.
    """
    optimizer = make_optimizer(config, 1)
    sizes = lora_sizes(model.spec, config.keys, config.num_layers, config.rank, optimizer)
    gathers = config.grad_accumulation_steps > 1 or config.max_grad_norm is not None or config.engine == "whole-graph"
    gradients = sizes.parameters if gathers else sizes.block_gradients
    state = sizes.state + (sizes.parameters if config.engine == "hizoo" else 0)
    parks = parks_state(config)
    needed = footprint_bytes() + sizes.parameters + gradients + (0 if parks else state)
    room = {f"the machine's memory is {memory_bytes() / 1e6:,.1f} MB": memory_bytes()}
    if (limit := process_limit()) is not None:
        room[str(limit)] = limit.footprint_bytes
    if config.budget_bytes is not None:
        room[f"--memory-budget is {config.budget_bytes / 1e6:,.1f} MB"] = config.budget_bytes
    what, least = min(room.items(), key=lambda entry: entry[1])
    if needed > least:
        raise BudgetError(
            f"--rank {config.rank}: LoRA takes {sizes.parameters / 1e6:,.1f} MB, gradients {gradients / 1e6:,.1f} MB, "
            f"optimizer state {state / 1e6:,.1f} MB{' on disk' if parks else ''}; {what}, the smallest workable budget "
            f"is above {math.ceil(needed / 1e6)}MB"
        )


def estimator_of(config: TrainConfig, lora: Lora) -> Estimator | None:
    """What makes a zeroth-order engine's estimates, as the options say; None for exact gradients."""
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


def make_plan(
    config: TrainConfig,
    model: Model,
    lora: Lora,
    updater: Updater,
    sizes: Sizes,
    base_bytes: int,
    estimator: Estimator | None,
) -> Planned | None:
    """Chooses and prints a plan; None for the engine that has none.

    base_bytes: the footprint before the model was opened; estimator: its arrays count as state. Raises BudgetError
    naming the smallest workable budget.
    """
    if config.engine == "whole-graph":
        if config.memory_budget not in (None, UNLIMITED) or config.phone is not None or config.dry_run:
            flags = "--memory-budget, --device, --dry-run"
            raise UserError(f"{flags}: not available with --engine whole-graph, which has no plan")
        return None
    parks = parks_state(config)
    state: dict[str, Any] = updater.optimizer.state
    kept = 0 if estimator is None else sum(int(value.nbytes) for value in estimator.state().values())
    job = job_for(
        model,
        lora,
        sizes.batch_size,
        sizes.longest,
        state_bytes=kept + (0 if parks else state_bytes(updater.optimizer)),
        parked_bytes=(updater.parked_bytes or parked_bytes(state)) if parks else 0,
        gathers=updater.gather,
        optimizer=config.optimizer_name,
        engine=config.engine,
        base_bytes=base_bytes,
        n_eval_tokens=sizes.longest_evaluated,
    )
    budget_bytes, limit = config.budget_bytes, process_limit()
    if limit is not None and (budget_bytes is None or limit.footprint_bytes < budget_bytes):
        budget_bytes = limit.footprint_bytes
    else:
        limit = None
    try:
        plan = choose_plan(job, budget_bytes, config.arena_budget)
    except BudgetError as error:
        raise BudgetError(f"{error}; {limit}" if limit is not None else str(error)) from None
    if config.smallest:
        plan = min(_ever_smaller(job, plan), key=lambda found: found[1])[0]
    predicted = predict(job, plan)
    print_plan(job, plan, predicted, table=config.dry_run)
    passes = 1 if estimator is None else len(estimator.probes)
    if config.phone is not None and config.dry_run:
        print("\n".join(project(config.phone, job, plan, passes)))
    return Planned(job, plan, predicted, config.budget_bytes, passes)


def parks_state(config: TrainConfig) -> bool:
    """Whether the optimizer's state lives in a file."""
    return config.engine == "mebp"


def plan_without_data(config: TrainConfig, model_path: Path) -> bool:
    """The dry run of a model without a tokenizer, on rows of --max-seq-length tokens; False where there is one."""
    if has_tokenizer(model_path):
        return False
    print(
        f"data       not read: {model_path} holds no tokenizer; planned for {config.batch_size} rows of "
        f"{config.max_seq_length:,} tokens"
    )
    base_bytes = footprint_bytes()
    model = mebp_mlx.open_model(model_path, config.dtype, config.weights)
    lora = make_lora(config, model)
    accumulate = config.grad_accumulation_steps
    optimizer = make_optimizer(config, max(1, config.iters // accumulate))
    updater = Updater(optimizer, lora, max_grad_norm=config.max_grad_norm, gather=accumulate > 1)
    longest = config.max_seq_length - 1  # the last token is only a label
    sizes = Sizes(config.batch_size, longest, longest)
    make_plan(config, model, lora, updater, sizes, base_bytes, estimator_of(config, lora))
    return True
