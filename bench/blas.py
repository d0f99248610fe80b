"""The matrix product under a training step, with the BLAS that mebp_mlx loads and with the one inside MLX's wheel.

Each case is a process of its own, since a BLAS can be chosen only before `mlx.core` is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

SHAPE = (256, 896, 4864)  # T, D, F of Qwen2.5-0.5B at 256 tokens


def measure(seconds: float) -> dict[str, Any]:
    """GFLOP/s of float32 products of SHAPE for about `seconds`, and the footprint that the first one adds."""
    from mebp_mlx.system.footprint import footprint_bytes
    from mebp_mlx.system.machine import load_blas

    blas = load_blas()
    import mlx.core as mx

    n, k, m = SHAPE
    x, w = mx.random.normal((n, k)), mx.random.normal((k, m))
    mx.eval(x, w)
    before_bytes = footprint_bytes()
    y = x @ w
    mx.eval(y)
    added_bytes = footprint_bytes() - before_bytes - y.nbytes
    times_s: list[float] = []
    process_began_s, began_s = time.process_time(), time.perf_counter()
    while len(times_s) < 5 or time.perf_counter() - began_s < seconds:
        start_s = time.perf_counter()
        y = x @ w
        mx.eval(y)
        times_s.append(time.perf_counter() - start_s)
    wall_s = time.perf_counter() - began_s
    flops = 2 * n * k * m
    slow_first = sorted(times_s, reverse=True)
    return {
        "blas": str(blas),
        "gflops": round(flops / statistics.median(times_s) / 1e9, 1),
        "gflops_p20": round(flops / slow_first[len(slow_first) // 5] / 1e9, 1),
        "gflops_best": round(flops / min(times_s) / 1e9, 1),
        "busy_cores": round((time.process_time() - process_began_s) / wall_s, 2),
        "added_mb": round(added_bytes / 1e6, 1),
    }


def child(seconds: float, blas: str | None) -> dict[str, Any]:
    environment = dict(os.environ) if blas is None else os.environ | {"MEBP_BLAS": blas}
    command = [sys.executable, "-m", "bench.blas", "--child", "--seconds", str(seconds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.blas", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case (default 2)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.seconds)))
        return 0
    from mebp_mlx.system.machine import machine

    cases = [child(options.seconds, None), child(options.seconds, "off")]
    print(f"float32 [{SHAPE[0]} x {SHAPE[1]}] x [{SHAPE[1]} x {SHAPE[2]}]")
    print(f"{'BLAS':26} {'GFLOP/s':>8} {'p20':>8} {'best':>8} {'cores':>6} {'MB added':>9}")
    for case in cases:
        print(f"{case['blas']:26} {case['gflops']:8.1f} {case['gflops_p20']:8.1f} {case['gflops_best']:8.1f} "
              f"{case['busy_cores']:6.2f} {case['added_mb']:9.1f}")
    print(json.dumps({"shape": SHAPE, "loaded": cases[0], "wheel": cases[1], "machine": machine()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
