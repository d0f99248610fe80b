"""`python -m bench.case MODEL`: one training case in this process, on random tokens; JSON on the last line.

Other benches start it for every case, because a peak footprint belongs to a process. The first step is reported
separately, because it includes allocating the pages of the file of kept values. `Stepper` is the setup that all benches
share: it makes model, LoRA, plan, engine and updater in the same way as `mebp_mlx.train`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mebp_mlx  # isort: skip  (before mlx: it loads the BLAS)
import numpy as np

from bench.report import Parser, positive, run, spread
from mebp_mlx.config import ZEROTH_ORDER, TrainConfig
from mebp_mlx.data.dataset import Batch
from mebp_mlx.engine import Engine, make_engine
from mebp_mlx.errors import UserError
from mebp_mlx.model.base import Model
from mebp_mlx.ops.plan import SAVE_INPUTS, SAVE_PRODUCTS, Plan
from mebp_mlx.options import convert, describe
from mebp_mlx.planner.projection import impose
from mebp_mlx.planner.work import Rates, bound_s, count, on_phone
from mebp_mlx.system.footprint import PeakMeter, footprint_bytes
from mebp_mlx.system.group import Group
from mebp_mlx.system.phone import DEVICES
from mebp_mlx.training.distributed import Deal
from mebp_mlx.training.optimizers import make_optimizer
from mebp_mlx.training.report import plan_record
from mebp_mlx.training.setup import Sizes, estimator_of, make_lora, make_plan, make_updater

SAVED = {"products": SAVE_PRODUCTS, "inputs": SAVE_INPUTS}


class Stepper:
    """Runs training steps, on given batches or on a random one.

    options: fields of TrainConfig. model: a folder or an open model. n_tokens: length of the longest row; n_evaluated:
    length of the longest row that is only evaluated. known: a plan to use if it fits. saved: "products" or "inputs",
    replaces the plan's kept values. n_updates: total updates, for learning-rate schedules. group: machines that share
    each batch's rows. Raises UserError, BudgetError.
    """

    def __init__(
        self,
        model: str | Path | Model,
        n_tokens: int,
        *,
        n_evaluated: int = 0,
        known: Plan | None = None,
        saved: str | None = None,
        n_updates: int = 1,
        group: Group | None = None,
        **options: Any,
    ):
        self.config = config = TrainConfig(**{"batch_size": 1, **options})
        self.n_tokens, self.deal = n_tokens, Deal(group or Group(), config.batch_size)
        if not isinstance(model, Model):
            model = mebp_mlx.open_model(model, config.dtype, config.weights)
        self.model = model
        if config.phone is not None:
            print(impose(config.phone, config.budget_bytes))
        self.lora = make_lora(config, model)
        optimizer, self.estimator = make_optimizer(config, n_updates), estimator_of(config, self.lora)
        sizes = Sizes(self.deal.most_rows, n_tokens, n_evaluated, self.deal.group.size)
        self.planned = make_plan(config, model, self.lora, sizes, self.estimator, known)
        if saved is not None and self.planned is not None:
            known = dataclasses.replace(self.planned.plan, saved=SAVED[saved])
            self.planned = make_plan(config, model, self.lora, sizes, self.estimator, known)
        plan = None if self.planned is None else self.planned.plan
        self.updater = make_updater(config, self.lora, plan, optimizer, self.deal.group)
        self.engine: Engine = make_engine(
            config.engine,
            model,
            self.lora,
            plan=plan,
            seed=config.seed,
            estimator=self.estimator,
            total=self.deal.group.total,
        )
        self.engine.reserve(self.deal.most_rows, n_tokens)
        self.batch = random_batch(model.spec.V, config.batch_size, n_tokens)

    @property
    def n_parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(int(value.size) for value in self.lora.parameters().values())

    @property
    def plan_record(self) -> dict[str, Any] | None:
        """The plan and its prediction as JSON; None if the engine has no plan."""
        return None if self.planned is None else plan_record(self.planned)

    def step(self, number: int, batch: Batch | None = None) -> float:
        """One step on `batch` (default: the random one); returns this machine's part of its loss."""
        batch = self.deal.part(self.batch if batch is None else batch)
        self.updater.begin_step()
        # The sink is looked up at each call: a bench may have wrapped it.
        loss = self.engine.step(
            batch, step=number, micro=0, n_labels=batch.n_labels, sink=lambda gradients: self.updater.sink(gradients)
        )
        self.updater.end_step()
        return loss

    def timed_step(self, number: int) -> float:
        """Runs a step on the random batch; returns its seconds."""
        began_s = time.perf_counter()
        self.step(number)
        return time.perf_counter() - began_s

    def close(self) -> None:
        """Frees the engine's file."""
        self.engine.close()


def random_batch(V: int, B: int, T: int, seed: int = 0) -> Batch:
    """Random tokens and targets, int32 [B, T]; every target is a label."""
    tokens, targets = np.random.default_rng(seed).integers(0, V, (2, B, T)).astype(np.int32)
    return Batch(tokens, targets, rows=("random",) * B, n_labels=tokens.size)


def measure(folder: str | Path, n_tokens: int, n_steps: int, forwards: bool = False, **options: Any) -> dict[str, Any]:
    """Peak footprint in MB, including planning, and seconds per step of `n_steps` steps after a first one; batch 1.

    forwards: also runs two forward passes of the same code after each step. options: arguments of Stepper.
    """
    before_bytes = footprint_bytes()
    with PeakMeter() as meter:
        with meter.phase("step"):
            stepper = Stepper(folder, n_tokens, **options)
            began_s = time.perf_counter()
            first_loss = stepper.step(0)
            first_s = time.perf_counter() - began_s
        step_s, forwards_s = [], []
        for number in range(n_steps):
            with meter.phase("step"):
                step_s.append(stepper.timed_step(1 + number))
            if forwards:
                with meter.phase("forward"):
                    began_s = time.perf_counter()
                    stepper.engine.evaluate(stepper.batch)
                    stepper.engine.evaluate(stepper.batch)
                    forwards_s.append(time.perf_counter() - began_s)
        stepper.close()
    result = {
        "engine": stepper.config.engine,
        "optimizer": stepper.config.optimizer_name,
        "tokens": n_tokens,
        "n_lora_parameters": stepper.n_parameters,
        "before_mb": round(before_bytes / 1e6, 1),
        "peak_mb": round(meter.phases["step"] / 1e6, 1),
        "first_loss": first_loss,
        "first_step_s": round(first_s, 3),
        "step_s": spread(step_s or [first_s], 3),
        "n_steps": max(1, n_steps),
        "plan": stepper.plan_record,
    }
    if forwards_s:
        result["forward_peak_mb"] = round(meter.phases["forward"] / 1e6, 1)
        result["two_forwards_s"] = spread(forwards_s, 3)
        result["ratio"] = spread([a / b for a, b in zip(step_s, forwards_s, strict=True)], 3)
    phone, planned = stepper.config.phone, stepper.planned
    if phone is not None and planned is not None:
        work = count(on_phone(planned.workload), planned.plan)
        result["device"] = phone.name
        result["device_bound_s"] = round(bound_s(work, Rates(phone.flops[2], phone.bandwidth)), 5)
    return result


def add_memory_budget(parser: argparse.ArgumentParser, default: str | None = "min", shown: str | None = None) -> None:
    """Adds --memory-budget, with the trainer's values. shown: describes a default that is not a value."""

    def value(text: str) -> str:
        try:
            convert(describe(TrainConfig)["memory_budget"], text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    shown = f"500MB; min: the smallest footprint; none: no limit (default: {shown or default})"
    parser.add_argument("--memory-budget", type=value, default=default, metavar="SIZE", help=shown)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Adds --device, --memory-budget and --limit-mb."""
    shown = "limit memory as for an app on this phone; report the roofline bound of its chip"
    parser.add_argument("--device", choices=list(DEVICES), help=shown)
    add_memory_budget(parser, None, "min, or an app's memory with --device")
    shown = "limit the process's private memory, reserved or used (RLIMIT_DATA, Linux only)"
    parser.add_argument("--limit-mb", type=positive, metavar="MB", help=shown)


def limit_flags(options: argparse.Namespace) -> list[object]:
    """These options as arguments of a child process."""
    given = {"--device": options.device, "--memory-budget": options.memory_budget, "--limit-mb": options.limit_mb}
    return [word for flag, value in given.items() if value is not None for word in (flag, value)]


def plan_line(plan: dict[str, Any] | None) -> str:
    """One line that describes a plan's record."""
    if plan is None:
        return "none"
    weights = "whole" if plan["weight_block_bytes"] is None else f"{plan['weight_block_bytes'] >> 10:,} KiB"
    return (
        f"grain {plan['grain']}, {plan['token_block']} tokens, {plan['query_block']} queries, weights {weights}, "
        f"logits {plan['logits_block_bytes'] >> 10:,} KiB; kept {plan['kept_in_memory_bytes'] / 1e6:.1f} MB in memory, "
        f"{plan['arena_bytes'] / 1e6:.1f} MB on disk; predicted peak {plan['predicted_peak_bytes'] / 1e6:.1f} MB"
    )


def _restart_under(limit_mb: int, argv: Sequence[str]) -> None:
    """Limits private memory and re-executes this process, so that the limit includes interpreter and imports."""
    import resource

    if not sys.platform.startswith("linux"):
        raise UserError(f"--limit-mb {limit_mb}: only Linux can limit private memory")
    limit_bytes = limit_mb * 1_000_000
    if resource.getrlimit(resource.RLIMIT_DATA)[0] != limit_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
        os.execv(sys.executable, [sys.executable, "-m", "bench.case", *argv])


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("case", __doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a model")
    parser.add_argument("--engine", default="mebp", choices=["mebp", *ZEROTH_ORDER])
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--tokens", type=positive, default=256, help="T (default: 256)")
    parser.add_argument("--steps", type=int, default=10, help="steps in the medians, after a first one; may be 0")
    parser.add_argument("--rank", type=positive, default=8)
    parser.add_argument("--saved", choices=list(SAVED), help="values kept for the backward pass (default: the plan's)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--forwards", action="store_true", help="run two forward passes after each step, for comparison")
    how.add_argument("--by-phase", action="store_true", help="measure time and memory of each phase (bench/phases.py)")
    how.add_argument("--plan-only", action="store_true", help="run no step")
    add_limits(parser)
    given = vars(parser.parse_args(argv))
    if given["limit_mb"] is not None:
        _restart_under(given["limit_mb"], sys.argv[1:] if argv is None else argv)
    by_phase, plan_only = given.pop("by_phase"), given.pop("plan_only")
    if given["memory_budget"] is None and given["device"] is None and not by_phase:
        given["memory_budget"] = "min"
    folder, n_tokens, n_steps = given.pop("model"), given.pop("tokens"), given.pop("steps")
    given = {name: value for name, value in given.items() if name not in ("command", "limit_mb")}
    if by_phase:
        from bench import phases

        del given["forwards"]
        print(json.dumps(phases.measure(folder, n_tokens, n_steps, **given)))
    elif plan_only:
        del given["forwards"]
        stepper = Stepper(folder, n_tokens, **given)
        print(json.dumps({"n_lora_parameters": stepper.n_parameters, "plan": stepper.plan_record}))
        stepper.close()
    else:
        print(json.dumps(measure(folder, n_tokens, n_steps, **given)))


if __name__ == "__main__":
    run(main)
