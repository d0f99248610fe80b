"""Time and footprint of opening a checkpoint's files: the headers of a Gemma-3-4B-sized model, whose data are holes.

Each repetition is a process of its own, so that nothing has been imported, mapped or allocated before.
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

from mebp_mlx.testing.synth import SHAPES, write_model


def measure(folder: str) -> dict[str, Any]:
    """Milliseconds and bytes of MappedWeights(folder) in this process, then of reading a row of each tensor."""
    from mebp_mlx.system.footprint import footprint_bytes
    from mebp_mlx.weights.safetensors import MappedWeights

    before_bytes, began_s = footprint_bytes(), time.perf_counter()
    weights = MappedWeights(folder)
    open_ms = (time.perf_counter() - began_s) * 1e3
    open_bytes = footprint_bytes() - before_bytes
    began_s = time.perf_counter()
    for name in weights.names:
        weights.view(name)[0].sum()
    touch_ms = (time.perf_counter() - began_s) * 1e3
    return {"open_ms": open_ms, "open_bytes": open_bytes, "touch_ms": touch_ms, "n_tensors": len(weights)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.open_cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="gemma3-4b", choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_model(options.shape, Path(temporary) / "model", sparse=True)
        n_files = len(list(folder.glob("*.safetensors")))
        command = [sys.executable, "-m", "bench.open_cost", "--child", str(folder)]
        runs = [
            json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            for _ in range(options.repeats)
        ]
    from mebp_mlx.system.machine import machine

    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    result = {
        "shape": options.shape,
        "n_tensors": runs[0]["n_tensors"],
        "n_files": n_files,
        "open_ms": round(median["open_ms"], 2),
        "open_ms_worst": round(max(run["open_ms"] for run in runs), 2),
        "open_mb": round(median["open_bytes"] / 1e6, 2),
        "open_mb_worst": round(max(run["open_bytes"] for run in runs) / 1e6, 2),
    }
    print(f"{options.shape}: {result['n_tensors']} tensors in {n_files} files, {options.repeats} processes")
    print(f"open       {result['open_ms']:8.2f} ms (worst {result['open_ms_worst']:.2f})   aim: < 50")
    print(f"footprint  {result['open_mb']:8.2f} MB (worst {result['open_mb_worst']:.2f})   aim: < 5")
    print(json.dumps(result | {"machine": machine()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
