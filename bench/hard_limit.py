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


def train_step(folder: str, limit_mb: int, n_tokens: int) -> dict[str, Any]:
    """In this process: the limit, then the imports, then a step of SGD. MemoryError or an abort where it is too small.

    The step's gradients go through the updater; the loss is that of random labels.
    """
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (limit_mb * 1_000_000,) * 2)
    import numpy as np

    import mebp_mlx
    from mebp_mlx.data import Batch
    from mebp_mlx.engine import make_engine
    from mebp_mlx.engine.update import Updater
    from mebp_mlx.optimizers import PlainSGD
    from mebp_mlx.runtime.footprint import PeakMeter

    with PeakMeter() as meter:
        model = mebp_mlx.open_model(folder)
        lora = mebp_mlx.init_lora(model, rank=8)
        engine = make_engine("mebp", model, lora)
        updater = Updater(PlainSGD(learning_rate=1e-4), lora)
        rng = np.random.default_rng(0)
        tokens, targets = rng.integers(0, model.spec.V, (2, 1, n_tokens)).astype(np.int32)
        updater.begin_step()
        began_s = time.perf_counter()
        loss = engine.step(
            Batch(tokens, targets, rows=("random",), n_labels=n_tokens),
            step=0, micro=0, n_labels=n_tokens, sink=updater.sink,
        )
        updater.end_step()
        step_s = time.perf_counter() - began_s
        engine.close()
    return {"loss": loss, "step_s": round(step_s, 2), "peak_mb": round(meter.peak_bytes / 1e6, 1)}


def run_child(folder: Path, limit_mb: int, n_tokens: int = 256, timeout_s: float | None = None) -> dict[str, Any]:
    """train_step in a process of its own: what it returns, or {"error": the last line it wrote}."""
    command = [sys.executable, "-m", "bench.hard_limit", "--case", str(folder)]
    command += ["--limit-mb", str(limit_mb), "--tokens", str(n_tokens)]
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
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(train_step(options.case, options.limit_mb, options.tokens)))
        return 0
    from bench.synth import write_model

    results = []
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{'shape':14}{'limit MB':>10}{'peak MB':>9}{'step s':>8}", flush=True)
        for shape in options.shapes:
            folder = write_model(shape, Path(scratch) / shape, layers=options.layers, sparse=True)
            found = run_child(folder, options.limit_mb, options.tokens)
            results.append({"shape": shape, "limit_mb": options.limit_mb, **found})
            figures = found.get("error") or f"{found['peak_mb']:9.0f}{found['step_s']:8.1f}"
            print(f"{shape:14}{options.limit_mb:10}{figures}", flush=True)
    print(json.dumps({"bench": "hard_limit", "tokens": options.tokens, "layers": options.layers, "results": results}))
    return 1 if any("error" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
