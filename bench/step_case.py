"""`python -m bench.step_case MODEL`: one engine's training steps on random tokens; JSON on the last line.

What bench.step, bench.step_table, bench.scaling and bench.sequence_length start for every case: the footprint's peak is
a process's, so each case has its own. The first step, in which the system gives the arena's file its pages, is reported
by itself.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from bench.report import positive, refuse, spread
from bench.stepper import Stepper, add_memory_budget
from mebp_mlx.config import ZEROTH_ORDER
from mebp_mlx.errors import UserError
from mebp_mlx.planner.work import Rates, bound_s, count, on_phone
from mebp_mlx.system.footprint import PeakMeter, footprint_bytes


def measure(folder: Path, n_tokens: int, n_steps: int, forwards: bool = False, **options: Any) -> dict[str, Any]:
    """Peak footprint in MB, planning included, and seconds a step of `n_steps` steps after a first one; batch 1.

    forwards: two forward passes after each of them, with the same code; options: of TrainConfig.
    """
    before_bytes = footprint_bytes()
    with PeakMeter() as meter:
        with meter.phase("step"):
            stepper = Stepper(folder, n_tokens, **options)
            first_s = stepper.timed_step(0)
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
    found = {
        "engine": stepper.config.engine,
        "optimizer": stepper.config.optimizer_name,
        "tokens": n_tokens,
        "n_lora_parameters": stepper.n_parameters,
        "before_mb": round(before_bytes / 1e6, 1),
        "peak_mb": round(meter.phases["step"] / 1e6, 1),
        "first_step_s": round(first_s, 3),
        "step_s": spread(step_s or [first_s], 3),
        "n_steps": max(1, n_steps),
        "plan": stepper.plan_record,
    }
    if forwards_s:
        found["forward_peak_mb"] = round(meter.phases["forward"] / 1e6, 1)
        found["two_forwards_s"] = spread(forwards_s, 3)
        found["ratio"] = spread([a / b for a, b in zip(step_s, forwards_s, strict=True)], 3)
    phone, planned = stepper.config.phone, stepper.planned
    if phone is not None and planned is not None:
        there = count(on_phone(planned.workload), planned.plan)
        found["device"] = phone.name
        found["device_bound_s"] = round(bound_s(there, Rates(phone.flops[2], phone.bandwidth)), 5)
    return found


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device and --memory-budget, for a case and for those who start it."""
    from mebp_mlx.system.phone import DEVICES

    parser.add_argument("--device", choices=list(DEVICES), help="impose this phone's app's memory; add its least time")
    add_memory_budget(parser, None, "min, or what --device gives an app")


def device_arguments(options: argparse.Namespace) -> list[object]:
    """The same, to be handed on."""
    given = {"--device": options.device, "--memory-budget": options.memory_budget}
    return [word for flag, value in given.items() if value is not None for word in (flag, value)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step_case", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--engine", default="mebp", choices=["mebp", *ZEROTH_ORDER])
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--tokens", type=positive, default=256)
    parser.add_argument("--steps", type=int, default=10, help="in the medians, after a first one; 0: that one alone")
    parser.add_argument("--rank", type=positive, default=8)
    parser.add_argument("--forwards", action="store_true", help="two forward passes after each step, too")
    add_device(parser)
    given = vars(parser.parse_args())
    if given["memory_budget"] is None and given["device"] is None:
        given["memory_budget"] = "min"
    folder, n_tokens, n_steps = given.pop("model"), given.pop("tokens"), given.pop("steps")
    try:
        print(json.dumps(measure(folder, n_tokens, n_steps, **given)))
    except UserError as error:
        refuse(error)


if __name__ == "__main__":
    main()
