"""`python -m bench.step_case MODEL`: one engine's training steps on random tokens; JSON on the last line.

What bench.step_table and bench.sequence_length start for every case: the footprint's peak is a process's, so each case
has its own. The first step, in which the system gives the arena's file its pages, is reported by itself.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import mebp_mlx  # isort: skip  (before mlx: it loads the BLAS)
import numpy as np

from bench.report import positive, spread
from mebp_mlx.config import ZEROTH_ORDER
from mebp_mlx.data import Batch
from mebp_mlx.engine import make_engine
from mebp_mlx.engine.choose import choose_plan
from mebp_mlx.engine.job import job_for
from mebp_mlx.engine.roofline import Rates, bound_s
from mebp_mlx.engine.update import Updater
from mebp_mlx.engine.zeroth_order import make_estimator
from mebp_mlx.optimizers import PlainSGD
from mebp_mlx.proxy import impose, on_phone
from mebp_mlx.runtime.footprint import PeakMeter, footprint_bytes
from mebp_mlx.runtime.phone import DEVICES, Phone


def measure(
    folder: Path, engine_name: str, n_tokens: int, n_steps: int, rank: int, phone: Phone | None = None
) -> dict[str, Any]:
    """Peak footprint in bytes and seconds a step of `n_steps` steps after a first one; SGD, batch 1.

    phone: whose app's memory is imposed, and for whose chip the least time of a step is counted.
    """
    before_bytes = footprint_bytes()
    with PeakMeter() as meter:
        model = mebp_mlx.open_model(folder)
        lora = mebp_mlx.init_lora(model, rank=rank)
        job = job_for(model, lora, 1, n_tokens, engine=engine_name, base_bytes=before_bytes)
        if phone is not None:
            impose(phone, phone.budget_bytes)
        plan = choose_plan(job, None if phone is None else phone.budget_bytes)
        zeroth = engine_name in ZEROTH_ORDER
        estimator = make_estimator(engine_name, lora, seed=0, eps=1e-2) if zeroth else None
        engine = make_engine(engine_name, model, lora, plan=plan, estimator=estimator)
        updater = Updater(PlainSGD(learning_rate=1e-4), lora)
        tokens, targets = np.random.default_rng(0).integers(0, model.spec.V, (2, 1, n_tokens)).astype(np.int32)
        batch = Batch(tokens, targets, rows=("random",), n_labels=n_tokens)
        engine.reserve(1, n_tokens)
        seconds = []
        for step in range(n_steps + 1):
            began_s = time.perf_counter()
            updater.begin_step()
            engine.step(batch, step=step, micro=0, n_labels=n_tokens, sink=updater.sink)
            updater.end_step()
            seconds.append(time.perf_counter() - began_s)
        engine.close()
    projected = {}
    if phone is not None:
        passes = 1 if estimator is None else len(estimator.probes)
        least_s = bound_s(on_phone(job, plan, passes), Rates(phone.flops[2], phone.bandwidth))
        projected = {"device": phone.name, "device_bound_s": round(least_s, 5)}
    return {
        **projected,
        "engine": engine_name,
        "tokens": n_tokens,
        "n_lora_parameters": sum(int(value.size) for value in lora.parameters().values()),
        "before_mb": round(before_bytes / 1e6, 1),
        "peak_mb": round(meter.peak_bytes / 1e6, 1),
        "first_step_s": round(seconds[0], 3),
        "step_s": spread(seconds[1:] or seconds, 3),
        "n_steps": max(1, n_steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step_case", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--engine", default="mebp", choices=["mebp", *ZEROTH_ORDER])
    parser.add_argument("--tokens", type=positive, default=256)
    parser.add_argument("--steps", type=positive, default=10)
    parser.add_argument("--rank", type=positive, default=8)
    parser.add_argument("--device", choices=list(DEVICES), help="impose this phone's app's memory")
    options = parser.parse_args()
    phone = DEVICES[options.device] if options.device else None
    print(json.dumps(measure(options.model, options.engine, options.tokens, options.steps, options.rank, phone)))


if __name__ == "__main__":
    main()
