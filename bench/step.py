"""`python -m bench.step`: footprint and time of a training step on a real shape, against two forward passes.

Each (shape, optimizer) runs in a process of its own (bench/step_case.py), alternating a training step (exact
gradients and update) with two forward passes of the same code, which is what MeZO pays.
Random weights, random tokens; the whole process is measured, interpreter and planning included. A first step is not in
the medians: the system gives the arena's file its pages then. Its time is reported by itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from bench import report
from bench.stepper import add_memory_budget, plan_line
from mebp_mlx.testing.synth import SHAPES

HEADS = ["shape", "optimizer", "before MB", "peak MB", "the paper", "step s", "2 fwd s", "ratio"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen2.5-0.5b"], choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--layers", type=report.positive, help="blocks (default: all)")
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"], choices=["sgd", "adamw"])
    parser.add_argument("--tokens", type=report.positive, default=256)
    parser.add_argument("--rank", type=report.positive, default=8)
    parser.add_argument("--steps", type=report.positive, default=5, help="steps in the medians, after a first one")
    parser.add_argument("--models", type=Path, help="keep the random models in this folder (default: a temporary one)")
    parser.add_argument("--no-forwards", action="store_true", help="steps alone: no ratio")
    add_memory_budget(parser)
    options = parser.parse_args()
    sizes = {"tokens": options.tokens, "rank": options.rank, "steps": options.steps}
    how = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    how += ["--memory-budget", options.memory_budget, *([] if options.no_forwards else ["--forwards"])]
    results, lines = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes:
            folder = report.model_of(shape, options.models or Path(scratch), options.layers)
            for optimizer in options.optimizers:
                found = report.run_module("bench.step_case", folder, "--optimizer", optimizer, *how)
                results.append({"shape": shape, "layers": options.layers or "all", **found})
                print(f"plan       {shape}, {optimizer}: {plan_line(found['plan'])}", flush=True)
                paper = report.PAPER.get(shape, {}).get("mebp_mb") if options.layers is None else None
                medians = [
                    found[key]["median"] if key in found else None for key in ("step_s", "two_forwards_s", "ratio")
                ]
                lines.append([shape, optimizer, found["before_mb"], found["peak_mb"], paper, *medians])
    print(report.table(HEADS, lines))
    print(json.dumps({"bench": "step", **sizes, "memory_budget": options.memory_budget, "results": results}))


if __name__ == "__main__":
    main()
