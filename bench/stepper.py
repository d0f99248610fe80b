"""Training steps on the bench: model, LoRA, plan, engine and updater made as `mebp_mlx.train` makes them."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import mebp_mlx  # isort: skip  (before mlx: it loads the BLAS)
import numpy as np

from mebp_mlx.config import TrainConfig
from mebp_mlx.data.dataset import Batch
from mebp_mlx.engine import Engine, make_engine
from mebp_mlx.model.base import Model
from mebp_mlx.ops.plan import Plan
from mebp_mlx.options import convert, describe
from mebp_mlx.planner.projection import impose
from mebp_mlx.training.optimizers import make_optimizer
from mebp_mlx.training.report import plan_record
from mebp_mlx.training.setup import Sizes, estimator_of, make_lora, make_plan, make_updater


class Stepper:
    """Makes steps of one run, on batches of its own choice or on random ones.

    options: of TrainConfig; model: a folder, or opened; n_tokens: of the longest row; n_evaluated: of the longest row
    that is only evaluated; known: a plan to take, if it fits; n_updates: of the run, for learning-rate schedules.
    Prints the plan in one line, as training does. Raises UserError, BudgetError.
    """

    def __init__(
        self,
        model: str | Path | Model,
        n_tokens: int,
        *,
        n_evaluated: int = 0,
        known: Plan | None = None,
        n_updates: int = 1,
        **options: Any,
    ):
        self.config = config = TrainConfig(**{"batch_size": 1, **options})
        self.n_tokens = n_tokens
        if not isinstance(model, Model):
            model = mebp_mlx.open_model(model, config.dtype, config.weights)
        self.model = model
        if config.phone is not None:
            print(impose(config.phone, config.budget_bytes))
        self.lora = make_lora(config, model)
        optimizer, self.estimator = make_optimizer(config, n_updates), estimator_of(config, self.lora)
        sizes = Sizes(config.batch_size, n_tokens, n_evaluated)
        self.planned = make_plan(config, model, self.lora, sizes, self.estimator, known)
        plan = None if self.planned is None else self.planned.plan
        self.updater = make_updater(config, self.lora, plan, optimizer)
        self.engine: Engine = make_engine(
            config.engine, model, self.lora, plan=plan, seed=config.seed, estimator=self.estimator
        )
        self.engine.reserve(config.batch_size, n_tokens)
        self.batch = random_batch(model.spec.V, config.batch_size, n_tokens)

    @property
    def n_parameters(self) -> int:
        """Trainable ones."""
        return sum(int(value.size) for value in self.lora.parameters().values())

    @property
    def plan_record(self) -> dict[str, Any] | None:
        """The plan and its prediction as JSON; None where the engine has no plan."""
        return None if self.planned is None else plan_record(self.planned)

    def step(self, number: int, batch: Batch | None = None) -> float:
        """One step on `batch` (the random one); its loss."""
        batch = self.batch if batch is None else batch
        self.updater.begin_step()
        # Through the attributes as they are now: a clock may be around them.
        loss = self.engine.step(
            batch, step=number, micro=0, n_labels=batch.n_labels, sink=lambda gradients: self.updater.sink(gradients)
        )
        self.updater.end_step()
        return loss

    def timed_step(self, number: int) -> float:
        """The seconds of a step on the random batch."""
        began_s = time.perf_counter()
        self.step(number)
        return time.perf_counter() - began_s

    def close(self) -> None:
        """Gives the engine's file back."""
        self.engine.close()


def random_batch(V: int, B: int, T: int, seed: int = 0) -> Batch:
    """Random tokens and targets [B, T], all of them labels."""
    tokens, targets = np.random.default_rng(seed).integers(0, V, (2, B, T)).astype(np.int32)
    return Batch(tokens, targets, rows=("random",) * B, n_labels=tokens.size)


def add_memory_budget(parser: argparse.ArgumentParser, default: str | None = "min", shown: str | None = None) -> None:
    """--memory-budget, with the trainer's values. shown: what the default is, where it is no value."""

    def value(text: str) -> str:
        try:
            convert(describe(TrainConfig)["memory_budget"], text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    parser.add_argument(
        "--memory-budget",
        type=value,
        default=default,
        metavar="SIZE",
        help=f"500MB; min: the smallest footprint; none (default: {shown or default})",
    )


def plan_line(plan: dict[str, Any] | None) -> str:
    """A plan's record in one line."""
    if plan is None:
        return "none"
    weights = "whole" if plan["weight_block_bytes"] is None else f"{plan['weight_block_bytes'] >> 10:,} KiB"
    return (
        f"grain {plan['grain']}, {plan['token_block']} tokens, {plan['query_block']} queries, weights {weights}, "
        f"logits {plan['logits_block_bytes'] >> 10:,} KiB; kept {plan['kept_in_memory_bytes'] / 1e6:.1f} MB in memory, "
        f"{plan['arena_bytes'] / 1e6:.1f} MB on disk; predicted peak {plan['predicted_peak_bytes'] / 1e6:.1f} MB"
    )
