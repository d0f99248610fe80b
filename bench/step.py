"""`python -m bench.step`: footprint and time of a training step on a real shape, against two forward passes.

Each (shape, optimizer) runs in a process of its own, alternating a training step (exact
gradients and update) with two forward passes of the same code, which is what MeZO pays.
Random weights, random tokens, the plan that training chooses without a budget; the whole process is
measured, interpreter included. A first step is not in the medians: the system gives the arena's file
its pages then. Its time is reported by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PAPER_MEBP_MB = {
    "qwen2.5-0.5b": 320,
    "qwen2.5-1.5b": 460,
    "qwen2.5-3b": 662,
    "gemma3-1b": 569,
    "gemma3-4b": 1029,
}


def measure(
    folder: str, n_tokens: int, rank: int, optimizer_name: str, n_steps: int, forwards: bool = True
) -> dict[str, Any]:
    """One case, in this process: MB before the model, at the peak of steps and of forwards, and the times."""
    from mebp_mlx.runtime.footprint import PeakMeter, footprint_bytes

    import mebp_mlx  # isort: skip
    import mlx.optimizers as optim
    import numpy as np

    from mebp_mlx.data import Batch
    from mebp_mlx.engine import make_engine
    from mebp_mlx.engine.choose import choose_plan
    from mebp_mlx.engine.job import job_for
    from mebp_mlx.engine.update import Updater
    from mebp_mlx.optimizers import PlainSGD

    before_mb = footprint_bytes() / 1e6
    with PeakMeter() as meter:
        model = mebp_mlx.open_model(folder)
        lora = mebp_mlx.init_lora(model, rank=rank)
        plan = choose_plan(job_for(model, lora, 1, n_tokens))
        engine = make_engine("mebp", model, lora, plan=plan)
        optimizers = {"sgd": PlainSGD, "adamw": optim.AdamW}
        updater = Updater(optimizers[optimizer_name](learning_rate=1e-4), lora, park=True)
        rng = np.random.default_rng(0)
        tokens, targets = rng.integers(0, model.spec.V, (2, 1, n_tokens)).astype(np.int32)
        batch = Batch(tokens, targets, rows=("random",), n_labels=n_tokens)
        engine.reserve(1, n_tokens)
        step_s, forwards_s, loss = [], [], 0.0
        for step in range(n_steps + 1):
            with meter.phase("step"):
                start_s = time.perf_counter()
                updater.begin_step()
                loss = engine.step(batch, step=step, micro=0, n_labels=n_tokens, sink=updater.sink)
                updater.end_step()
                step_s.append(time.perf_counter() - start_s)
            if not forwards or step == 0:
                continue
            with meter.phase("forward"):
                start_s = time.perf_counter()
                engine.evaluate(batch)
                engine.evaluate(batch)
                forwards_s.append(time.perf_counter() - start_s)
    found: dict[str, Any] = {
        "n_lora_parameters": sum(p.size for p in lora.parameters().values()),
        "before_model_mb": round(before_mb, 1),
        "peak_mb": round(meter.phases["step"] / 1e6, 1),
        "step_s": round(statistics.median(step_s[1:] or step_s), 2),
        "first_step_s": round(step_s[0], 2),
        "loss": round(loss, 3),
    }
    if forwards:
        ratios = sorted(a / b for a, b in zip(step_s[1:], forwards_s, strict=True))
        found["forward_peak_mb"] = round(meter.phases["forward"] / 1e6, 1)
        found["two_forwards_s"] = round(statistics.median(forwards_s), 2)
        found["ratio"] = round(statistics.median(ratios), 3)
        found["ratio_range"] = [round(ratios[0], 3), round(ratios[-1], 3)]
    return found


def run_case(
    folder: Path, n_tokens: int, rank: int, optimizer_name: str, n_steps: int, forwards: bool = True
) -> dict[str, Any]:
    """The same in a process of its own."""
    command: list[object] = [sys.executable, "-m", "bench.step", "--case", folder, "--optimizers", optimizer_name]
    command += ["--tokens", n_tokens, "--rank", rank, "--steps", n_steps, *([] if forwards else ["--no-forwards"])]
    run = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen2.5-0.5b"], help="as in bench.synth")
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"], choices=["sgd", "adamw"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="steps in the medians, after a first one")
    parser.add_argument("--models", type=Path, help="keep the random models in this folder (default: a temporary one)")
    parser.add_argument("--no-forwards", action="store_true", help="steps alone: no ratio")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        how = (options.tokens, options.rank, options.optimizers[0], options.steps, not options.no_forwards)
        print(json.dumps(measure(options.case, *how)))
        return

    from bench.synth import write_model

    results = []
    with tempfile.TemporaryDirectory() as scratch:
        heads = {"optimizer": 10, "before": 8, "peak MB": 9, "paper": 7, "step s": 8, "2 fwd s": 9, "ratio": 7}
        print(f"{'shape':14}" + "".join(f"{name:>{width}}" for name, width in heads.items()))
        for shape in options.shapes:
            folder = (options.models or Path(scratch)) / shape
            if not (folder / "config.json").exists():
                write_model(shape, folder)
            for optimizer in options.optimizers:
                found = run_case(
                    folder, options.tokens, options.rank, optimizer, options.steps, not options.no_forwards
                )
                results.append({"shape": shape, "optimizer": optimizer, **found})
                print(
                    f"{shape:14}{optimizer:>10}{found['before_model_mb']:8.0f}{found['peak_mb']:9.0f}"
                    f"{PAPER_MEBP_MB.get(shape, '-'):>7}{found['step_s']:8.2f}"
                    f"{found.get('two_forwards_s', '-'):>9}{found.get('ratio', '-'):>7}",
                    flush=True,
                )
    sizes = {"tokens": options.tokens, "rank": options.rank, "steps": options.steps}
    print(json.dumps({"bench": "step", **sizes, "results": results}))


if __name__ == "__main__":
    main()
