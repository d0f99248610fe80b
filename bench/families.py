"""Every family's real shapes in one table: `python -m bench families`.

Weights are zeros that take no disk space: memory and plans depend only on shapes. A shape is a row of
mebp_mlx/testing/shapes.py; its family's small models (mebp_mlx/testing/tiny.py) give the gradient error. Each case runs
in its own process, and each row is printed and written as soon as it is measured.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import report
from bench.parity import PLANS
from mebp_mlx.testing.synth import SHAPES, layers_of, model_config
from mebp_mlx.testing.tiny import CONFIGS

PARTS = ("plan", "step", "error", "within")
# Large models within a budget: (T, --memory-budget), for shapes with LARGE parameters.
WITHIN = ((256, "256MB"), (2048, "512MB"))
LARGE = (7e9, 9.5e9)
LIMIT_MB = 1000
HEADS = [
    "family",
    "shape",
    "parameters",
    "LoRA",
    "min, MB",
    "1 GB, MB",
    "kept",
    "peak at min, MB",
    "1 GB limit",
    "error",
]
WITHIN_HEADS = ["shape", "T", "budget", "predicted MB", "peak MB", "within"]


def main(argv: Sequence[str] | None = None) -> int:
    """Family by real shape: parameters, LoRA parameters, plans at `min` and at 1 GB, and the peak of one step at `min`
    under an operating-system limit of 1 GB (Linux); the worst gradient error of the family's small models against
    mlx-lm; and models of 8B within 256 MB at T = 256 and 512 MB at T = 2,048. Batch 1, rank 8, SGD.
    """
    parser = report.parser("families", main.__doc__)
    shown = f"of {', '.join(SHAPES)} (default: all)"
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="SHAPE", help=shown)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the measurements")
    parser.add_argument("--layers", type=report.positive, help="number of blocks (default: all)")
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    parser.add_argument("--timeout-s", type=report.positive, default=1800, help="of one case (default: 1800)")
    options = parser.parse_args(argv)
    if options.quick:
        options.layers = options.layers or 4
    about, rows, errors = report.context("families", options), [], dict[str, float]()
    print(_line(HEADS), _line(["---"] * len(HEADS)), sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes:
            row = _row(shape, Path(scratch), options, errors)
            rows.append(row)
            print(_line(_cells(row)), flush=True)
            if options.out is not None:
                report.write("families", options.out, rows, about)
        within = _within(Path(scratch), options) if "within" in options.only else []
    report.publish("families", options, rows, within=within)
    return 1 if any(row.get("step_error") for row in rows) or any("error" in row for row in within) else 0


def _row(shape: str, scratch: Path, options: Any, errors: dict[str, float]) -> dict[str, Any]:
    """All figures of one shape. errors: of families measured so far."""
    began_s, family = time.perf_counter(), _model_type(model_config(shape, options.layers))
    row: dict[str, Any] = {"family": family, "shape": shape, "layers": options.layers or "all"}
    row["n_parameters"] = _n_parameters(shape, options)
    folder = report.model_of(shape, scratch, options.layers, sparse=True)
    if "plan" in options.only:
        plan = _case(folder, options, options.tokens, "--memory-budget", "1GB", "--plan-only")
        row |= {"n_lora_parameters": plan.get("n_lora_parameters"), "plan_error": plan.get("error")}
        if "plan" in plan:
            row["plan_1gb"] = plan["plan"]
    if "step" in options.only:
        limit_mb = LIMIT_MB if sys.platform.startswith("linux") else None
        limit = [] if limit_mb is None else ["--limit-mb", limit_mb]
        step = _case(folder, options, options.tokens, "--memory-budget", "min", *limit)
        row["limit_mb"] = limit_mb
        row |= {"peak_mb": step.get("peak_mb"), "step_s": step.get("first_step_s"), "step_error": step.get("error")}
        if "plan" in step:
            row |= {"plan_min": step["plan"], "n_lora_parameters": step["n_lora_parameters"]}
    if "error" in options.only:
        if family not in errors:
            errors[family] = _worst_error(family, options)
        row["gradient_error"] = errors[family]
    return row | {"seconds": round(time.perf_counter() - began_s, 1)}


def _n_parameters(shape: str, options: Any) -> int:
    return sum(math.prod(layer.shape) for layer in layers_of(model_config(shape, options.layers)))


def _case(folder: Path, options: Any, n_tokens: int, *flags: object) -> dict[str, Any]:
    how = ("--tokens", n_tokens, "--steps", 0)
    return report.run_module("bench.case", folder, *how, *flags, may_fail=True, timeout_s=options.timeout_s)


def _worst_error(family: str, options: Any) -> float:
    """The gradient error of a family's small models in float32 (bench.parity); NaN if there is none or it fails."""
    names = [name for name, config in CONFIGS.items() if _model_type(config) == family]
    if not names:
        return math.nan
    how = ("--families", *names, "--weights", "float32", "--seeds", 1)
    result = report.run_module("bench.parity", *how, may_fail=True, timeout_s=options.timeout_s)
    found = [
        row[plan] for row in result.get("largest_relative_error", {}).values() for plan in row.keys() & PLANS.keys()
    ]
    return max(found) if found and all(error == error for error in found) else math.nan


def _model_type(config: dict[str, Any]) -> str:
    return str(config.get("text_config", config)["model_type"])


def _within(scratch: Path, options: Any) -> list[dict[str, Any]]:
    """One step of each large model within each budget."""
    rows: list[dict[str, Any]] = []
    for shape in options.shapes:
        if not LARGE[0] <= _n_parameters(shape, options) <= LARGE[1]:
            continue
        folder = report.model_of(shape, scratch, options.layers, sparse=True)
        for n_tokens, budget in WITHIN:
            result = _case(folder, options, n_tokens, "--memory-budget", budget)
            if not rows:
                print("", _line(WITHIN_HEADS), _line(["---"] * len(WITHIN_HEADS)), sep="\n")
            row = {"shape": shape, "tokens": n_tokens, "budget": budget, "peak_mb": result.get("peak_mb")}
            row |= {"error": result["error"]} if "error" in result else {"plan": result["plan"]}
            if "error" not in row and not result["peak_mb"] <= float(budget.removesuffix("MB")):
                row["error"] = "above the budget"
            rows.append(row)
            cells = [shape, n_tokens, budget, _mb(row.get("plan")), row["peak_mb"], row.get("error", "yes")]
            print(_line(cells), flush=True)
    return rows


def _mb(plan: dict[str, Any] | None) -> float | None:
    return None if plan is None else plan["predicted_peak_bytes"] / 1e6


def _cells(row: dict[str, Any]) -> list[Any]:
    """A row's cells under HEADS."""
    kept = row.get("plan_1gb")
    where = None if kept is None else "memory" if not kept["arena_bytes"] else "file"
    at_1gb = row["plan_error"] if row.get("plan_error") else _mb(kept)
    limit = row.get("step_error") or ("passed" if row.get("limit_mb") else None)
    counts = [f"{row['n_parameters'] / 1e9:.2f} G", _millions(row.get("n_lora_parameters"))]
    error = row.get("gradient_error")
    figures = [_mb(row.get("plan_min")), at_1gb, where, row.get("peak_mb"), limit]
    return [row["family"], row["shape"], *counts, *figures, None if error is None else f"{error:.1e}"]


def _millions(count: int | None) -> str | None:
    return None if count is None else f"{count / 1e6:.1f} M"


def _line(cells: Sequence[Any]) -> str:
    """A line of a Markdown table."""
    words = ["-" if cell is None else f"{cell:,.0f}" if isinstance(cell, float) else str(cell) for cell in cells]
    return f"| {' | '.join(words)} |"


if __name__ == "__main__":
    report.run(main)
