"""One training step of each real shape under an operating-system limit on the process's anonymous memory.

RLIMIT_DATA counts private writable memory that is reserved, touched or not: more than the footprint, never less.
Linux only. Sparse weights (all zero) at full depth: sizes depend on shapes alone, and no file takes room.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "gemma3-1b", "gemma3-4b", "qwen2.5-7b")


def train_step(folder: str, limit_mb: int, n_tokens: int, memory_budget: str) -> dict[str, Any]:
    """In this process: the limit, then the imports, then a step of SGD. An abort where the limit is too small.

    The step's gradients go through the updater; the loss is that of random labels.
    """
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (limit_mb * 1_000_000,) * 2)
    from bench.stepper import Stepper
    from mebp_mlx.system.footprint import PeakMeter

    with PeakMeter() as meter:
        stepper = Stepper(folder, n_tokens, optimizer="sgd", memory_budget=memory_budget)
        began_s = time.perf_counter()
        loss = stepper.step(0)
        step_s = time.perf_counter() - began_s
        stepper.close()
    peak_mb = round(meter.peak_bytes / 1e6, 1)
    return {"loss": loss, "step_s": round(step_s, 2), "peak_mb": peak_mb, "plan": stepper.plan_record}


def run_child(
    folder: Path, limit_mb: int, n_tokens: int = 256, timeout_s: float | None = None, memory_budget: str = "min"
) -> dict[str, Any]:
    """train_step in a process of its own: what it returns, or {"error": the last line it wrote}."""
    command = [sys.executable, "-m", "bench.hard_limit", "--case", str(folder)]
    command += ["--limit-mb", str(limit_mb), "--tokens", str(n_tokens), "--memory-budget", memory_budget]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=Path(__file__).parents[1])
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.hard_limit", description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--limit-mb", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, help="blocks (default: all)")
    parser.add_argument(
        "--memory-budget", default="min", metavar="SIZE", help="as of the trainer (default: min); the limit is one too"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:  # imports come after the limit
        print(json.dumps(train_step(options.case, options.limit_mb, options.tokens, options.memory_budget)))
        return 0
    from bench.stepper import plan_line
    from mebp_mlx.testing.synth import write_model

    results = []
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{'shape':14}{'limit MB':>10}{'peak MB':>9}{'step s':>8}  plan", flush=True)
        for shape in options.shapes:
            folder = write_model(shape, Path(scratch) / shape, layers=options.layers, sparse=True)
            found = run_child(folder, options.limit_mb, options.tokens, memory_budget=options.memory_budget)
            results.append({"shape": shape, "limit_mb": options.limit_mb, **found})
            if "error" in found:
                figures = found["error"]
            else:
                figures = f"{found['peak_mb']:9.0f}{found['step_s']:8.1f}  {plan_line(found['plan'])}"
            print(f"{shape:14}{options.limit_mb:10}{figures}", flush=True)
    sizes = {"tokens": options.tokens, "layers": options.layers, "memory_budget": options.memory_budget}
    print(json.dumps({"bench": "hard_limit", **sizes, "results": results}))
    return 1 if any("error" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
