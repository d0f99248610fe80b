"""Predicted and measured peak footprints over a grid of cases: `python -m bench.plan_check`.

Each case runs in its own process. It predicts its peak in the same way as training, with a probe before the first step,
then trains a few steps and compares. Models have a real shape's width, random weights and few blocks: each further
block adds only its LoRA parameters and its values kept in memory to the footprint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import report

SMALL = {
    "weight_block_bytes": 1 << 20,
    "head_block_bytes": 2 << 20,
    "logits_block_bytes": 1 << 20,
    "token_block": 64,
    "query_block": 32,
}
BLOCKS: dict[str, dict[str, Any]] = {
    "default": {},
    "small": SMALL,
    # Kept values and optimizer state in files, as the search would choose.
    "small on disk": {**SMALL, "kept_bytes": 0, "offload_state": True},
    "lazy": {"grain": "block"},
}


@dataclass(frozen=True)
class Case:
    """A training case and its plan; with a --memory-budget, `policy` and `blocks` are not used."""

    shape: str
    T: int
    B: int = 1
    optimizer: str = "sgd"
    policy: str = "products"
    blocks: str = "default"
    engine: str = "mebp"
    dropout: float = 0.0
    budget: str = ""
    dtype: str = "float32"
    weights: str = "decompressed"
    layers: int = 3

    def __str__(self) -> str:
        plan = f"--memory-budget {self.budget}" if self.budget else f"{self.policy} {self.blocks}"
        text = f"{self.shape} x{self.layers} T={self.T} B={self.B} {self.optimizer} {plan}"
        text += f" {self.dtype} {self.weights}" * (self.dtype != "float32" or self.weights == "packed")
        return text + f" {self.engine}" * (self.engine != "mebp") + f" dropout {self.dropout}" * (self.dropout > 0)


LONG_ROWS = [Case("qwen2.5-0.5b", T, budget="1GB") for T in (16_384, 32_768)]


def measure(folder: str, case: Case, n_steps: int = 2) -> dict[str, Any]:
    """Runs a case in this process: bytes predicted and measured by phase, and MLX's count of its arrays."""
    from bench.case import SAVED, Stepper  # isort: skip  (before mlx: it loads the BLAS)
    import mlx.core as mx

    from bench.instruments import Phases
    from mebp_mlx.ops.plan import Plan
    from mebp_mlx.system.footprint import PeakMeter, footprint_bytes

    before = footprint_bytes()
    arrays: dict[str, int] = {}
    known = None
    if not case.budget:
        known = Plan(saved=SAVED[case.policy], **BLOCKS[case.blocks])
    with PeakMeter() as meter:

        def around(phase: str, run: Callable[[], Any]) -> Any:
            name = {"h": "head", "b": "backward"}.get(phase[0], "forward")
            mx.reset_peak_memory()
            with meter.phase(name):
                value = run()
            arrays[name] = max(arrays.get(name, 0), mx.get_peak_memory())
            return value

        same = {name: getattr(case, name) for name in ("optimizer", "engine", "dropout", "dtype", "weights")}
        budget = case.budget or "none"
        stepper = Stepper(folder, case.T, known=known, batch_size=case.B, memory_budget=budget, **same)
        planning = meter.peak_bytes
        phases = Phases(around)
        for step in range(1 if case in LONG_ROWS else 2):
            stepper.step(step)
        phases.remove()
        peak = meter.peak_bytes
        stepper.close()
    assert stepper.planned is not None
    predicted = stepper.planned.predicted
    return {
        "before": before,
        "planning": planning,
        "measured": dict(meter.phases),
        "arrays": arrays,
        "peak": peak,
        "predicted": predicted.phases,
        "predicted_peak": predicted.peak_bytes,
        "plan": stepper.plan_record,
    }


def grid(quick: bool) -> list[Case]:
    """The cases."""
    small, wide, gemma = "qwen2.5-0.5b", "qwen2.5-1.5b", "gemma3-1b"
    if quick:
        return [Case(small, 64), Case(small, 256, optimizer="adamw"), Case(gemma, 256, policy="inputs")]
    cases = [Case(small, T, B) for T, B in ((64, 1), (256, 1), (256, 4), (1024, 1), (2048, 1))]
    cases += [Case(small, 256, 1, "adamw"), Case(small, 256, 1, engine="mezo"), Case(small, 256, dropout=0.1)]
    shapes = itertools.product((small, gemma), (256, 1024), ("default", "small"))
    cases += [Case(shape, T, policy="inputs", blocks=blocks) for shape, T, blocks in shapes]
    cases += [Case(shape, T) for shape, T in itertools.product((wide, gemma), (64, 256, 1024))]
    cases += [Case(shape, T, blocks="small") for shape, T in itertools.product((small, wide, gemma), (256, 2048))]
    cases += [Case(gemma, 256, 2, "adamw", blocks="small"), Case(wide, 128, 4, "adamw")]
    cases += [Case(small, 256, optimizer="adamw", blocks="small on disk"), Case(small, 256, blocks="lazy")]
    cases += [Case(small, T, layers=2) for T in (4096, 8192)]
    cases += [Case(small, T, layers=2, budget="min") for T in (4096, 8192)]
    budgets = ((small, 256, "60MB"), (small, 2048, "1GB"), (small, 2048, "100MB"), (wide, 1024, "1GB"))
    cases += [Case(shape, T, budget=budget) for shape, T, budget in (*budgets, (gemma, 1024, "100MB"))]
    cases += [Case(shape, 256, optimizer="adamw", budget="min") for shape in (small, wide, gemma)]
    cases += [Case(small, 256, 4, budget="min"), Case(small, 256, engine="mezo", budget="min")]
    # Metal's defaults; few tokens, because they are slow on a CPU.
    cases += [Case(small, 48, dtype="bfloat16", weights=weights) for weights in ("packed", "decompressed")]
    cases += [Case(small, 48, weights="packed")]
    cases += [Case(shape, 256, budget="min", layers=layers) for shape, layers in ((small, 24), (gemma, 26))]  # whole
    return cases


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.Parser("plan_check", __doc__)
    parser.add_argument("--quick", action="store_true", help="run only three cases")
    parser.add_argument("--long", action="store_true", help="run rows of 16,384 and 32,768 tokens within 1 GB: slow")
    parser.add_argument("--match", default="", metavar="TEXT", help="run only cases whose line contains TEXT")
    report.add_models(parser)
    parser.add_argument("--phases", action="store_true", help="print each phase")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # folder, and Case as JSON; runs it in this process
    options = parser.parse_args(argv)
    if options.case:
        print(json.dumps(measure(options.case[0], Case(**json.loads(options.case[1])))))
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{'case':64}{'predicted':>10}{'measured':>10}{'MB off by':>11}  peak phase", flush=True)
        cases = LONG_ROWS if options.long else grid(options.quick)
        for case in (case for case in cases if options.match in str(case)):
            folder = report.model_of(case.shape, options.models or Path(scratch), case.layers)
            result = report.run_module("bench.plan_check", "--case", folder, json.dumps(asdict(case)))
            off = result["predicted_peak"] / result["peak"] - 1
            by_phase = max(result["predicted"], key=result["predicted"].get)
            megabytes = f"{result['predicted_peak'] / 1e6:10.1f}{result['peak'] / 1e6:10.1f}"
            print(f"{case!s:64}{megabytes}{off:+11.1%}  {by_phase}", flush=True)
            if options.phases:
                _print_phases(result)
            results.append({**asdict(case), **result, "relative_difference": round(off, 4)})
    if not results:
        raise SystemExit(f"no case contains --match {options.match!r}")
    worst = max((result["relative_difference"] for result in results), key=abs)
    print(f"largest difference {worst:+.1%}")
    print(json.dumps({"bench": "plan_check", "largest_relative_difference": worst, "results": results}))


def _print_phases(result: dict[str, Any]) -> None:
    print(f"    {'planning':10}{'':8}{result['planning'] / 1e6:8.1f}")
    for name, n_bytes in result["predicted"].items():
        measured, arrays = result["measured"].get(name, 0), result["arrays"].get(name, 0)
        print(f"    {name:10}{n_bytes / 1e6:8.1f}{measured / 1e6:8.1f}   arrays {arrays / 1e6:8.1f}")


if __name__ == "__main__":
    report.run(main)
