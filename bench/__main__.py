"""Lists the benches, and runs one by name: `python -m bench [NAME [options]]`; `python -m bench NAME --help`.

Each prints a table, then one line of JSON. bench/README.md describes the benches and their results.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from bench import report

# The paper's tables and figures, and the comparison with mlx-lm; `all` runs them in this order. (module, one line)
RESULTS = {
    "step_table": ("step", "the paper's table: memory and time per step, five shapes, MeZO and MeBP"),
    "sequence_length": ("step", "memory and time per step by sequence length"),
    "decompression": ("micro", "share of decompression in a step; products of decompressed and packed weights"),
    "per_layer": ("phases", "Figure 2: memory and time of a step, phase by phase"),
    "convergence": ("learning", "Figure 1: learning curves of exact gradients and MeZO"),
    "zo_variants": ("learning", "Figure 3: learning curves of MeZO, K-ZOO, HiZOO and FZOO"),
    "projection": ("projection", "the iPhone proxy: projected time per step, compared with the paper's"),
    "versus": ("versus", "time and memory, compared with mlx-lm's trainer and whole-graph checkpointing"),
}
MEASUREMENTS = {
    "step": ("step", "footprint and time of a step, compared with two forward passes, real shapes"),
    "scaling": ("step", "footprint by number of layers and by sequence length"),
    "hard_limit": ("step", "a step under an operating-system limit on private memory (Linux)"),
    "case": ("case", "one training case in this process: footprint, time, plan"),
    "families": ("families", "every family's real shapes: parameters, plans, peaks, a limit of 1 GB, gradient error"),
    "plan_check": ("plan_check", "predicted and measured peak footprint"),
    "parity": ("parity", "gradients compared with mlx-lm's models, by family"),
    "flags": ("flags", "mlx_lm.lora's options compared with mebp_mlx's, each tried on both parsers"),
    "dispatch": ("dispatch.__main__", "counts of a step on a GPU: waits, submissions, graph nodes, copies"),
    "profile": ("profile", "time of a step by stage, and the speed of its products"),
    "in_memory": ("versus", "a step compared with mlx-lm's model, decompressed in memory"),
    "head": ("micro", "the head compared with its two matrix products"),
    "kernels": ("kernels", "attention's kernels and MLX's path: operations, bytes, bounds, occupancy"),
    "head_backward": ("kernels", "why the head's gradient has no kernel of its own: bytes and operations"),
    "head_forward": ("kernels", "when the head's kernel beats two products: counted"),
    "blas": ("micro", "matrix products with the loaded BLAS and with MLX's own"),
    "torture": ("torture.__main__", "stopped runs, full disks and damaged files: lost data and error messages"),
    "distributed": ("distributed", "processes that share a batch: scaling, bytes sent, waiting, memory, links"),
    "open_cost": ("micro", "time and footprint of opening a checkpoint"),
}
TOOLS = {
    "all": ("__main__", "all results, one after the other; with --quick in minutes"),
    "draw": ("__main__", "redraws the picture of a result from its CSV: draw NAME --out DIR"),
    "synth": ("synth", "writes a model of a real shape with random weights: synth SHAPE DIR"),
    "bundled": ("bundled.__main__", "makes the bundled model and data (not a measurement)"),
}
BENCHES = {**RESULTS, **MEASUREMENTS, **TOOLS}


def run_all(argv: Sequence[str]) -> int:
    """Runs all results, one after the other: NAME.csv, NAME.json and NAME.png under --out.

    If a bench fails, the others still run and the exit code is 1.
    """
    parser = report.parser("all", run_all.__doc__)
    parser.add_argument("--only", nargs="+", choices=list(RESULTS), default=list(RESULTS), help="run only these")
    parser.add_argument("--without", nargs="+", choices=list(RESULTS), default=[], help="run all but these")
    options = parser.parse_args(argv)
    more = ["--quick"] if options.quick else []
    more += [] if options.out is None else ["--out", str(options.out)]
    rows: list[dict[str, Any]] = []
    for name in options.only:
        if name in options.without:
            continue
        what = BENCHES[name][1]
        print(f"\n--- {name}: {what}", flush=True)
        began_s = time.perf_counter()
        code, last = _run([sys.executable, "-m", "bench", name, *more])
        seconds = round(time.perf_counter() - began_s, 1)
        works = code == 0 and last.get("bench") == name
        if not works:
            print(f"error: bench {name} failed with exit code {code}", file=sys.stderr, flush=True)
        rows.append({"name": name, "what": what, "seconds": seconds, "exit_code": code, "works": works})
    words = ["ok" if row["works"] else f"failed ({row['exit_code']})" for row in rows]
    lines = [[row["name"], row["what"], row["seconds"], word] for row, word in zip(rows, words, strict=True)]
    print("\n" + report.table(["bench", "what", "s", ""], lines))
    print(f"{sum(row['seconds'] for row in rows) / 60:.1f} minutes")
    print(json.dumps({"bench": "all", "rows": rows}))
    return 0 if all(row["works"] for row in rows) else 1


def _run(command: list[str]) -> tuple[int, dict[str, Any]]:
    """(exit code, JSON object on the last line); the earlier lines are printed."""
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if last:
                print(last, end="", flush=True)
            last = line
    try:
        result = json.loads(last)
    except ValueError:
        print(last, end="", flush=True)
        result = {}
    return process.returncode, result if isinstance(result, dict) else {}


def draw(argv: Sequence[str]) -> None:
    """Redraws NAME.png from NAME.csv and NAME.json in the folder --out; measures nothing."""
    pictures = [*RESULTS, "dispatch", "distributed"]
    parser = report.Parser("draw", draw.__doc__)
    parser.add_argument("name", metavar="NAME", choices=pictures, help=", ".join(pictures))
    parser.add_argument("--out", type=report.Path, required=True, help="folder of the result")
    options = parser.parse_args(argv)
    module = importlib.import_module(f"bench.{BENCHES[options.name][0]}")
    report.draw_again(options.name, options.out, module.PICTURES[options.name])


def main(argv: Sequence[str] | None = None) -> object:
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help"):
        print(__doc__)
        for heading, benches in (("results", RESULTS), ("measurements", MEASUREMENTS), ("tools", TOOLS)):
            print(f"{heading}:")
            print("\n".join(f"  {name:16} {what}" for name, (_, what) in benches.items()))
        return 0
    name, *rest = given
    if name not in BENCHES:
        report.refuse(f"{name}: no such bench; python -m bench lists them")
    if name in ("all", "draw"):
        return {"all": run_all, "draw": draw}[name](rest)
    module = importlib.import_module(f"bench.{BENCHES[name][0]}")
    return module.main([name, *rest] if name in getattr(module, "BENCHES", {}) else rest)


if __name__ == "__main__":
    report.run(main)
