"""The time of a step on a phone's chip, counted and not measured."""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mebp_mlx
from bench import report
from mebp_mlx.engine.zeroth_order import make_estimator
from mebp_mlx.ops.plan import SAVE_INPUTS, SAVE_PRODUCTS, Plan
from mebp_mlx.planner.work import Rates, Work, bound_s, count
from mebp_mlx.planner.workload import Workload
from mebp_mlx.system.child import run_child
from mebp_mlx.system.phone import DEVICES
from mebp_mlx.testing.synth import write_model

CALIBRATED_BY = ("qwen2.5-0.5b", "mezo")
ENGINES = ("mezo", "mebp")
HEADS = ["shape", "engine", "GFLOP", "GB", "bound s", "predicted s", "paper s", "error", "ours s"]


def projection(argv: Sequence[str]) -> None:
    """The iPhone proxy: the time of a step on a phone's chip, from counted operations and bytes.

    For each of the paper's shapes and each engine it prints the roofline bound at the chip's published peak rates, in
    16 bits with packed weights; the time at the efficiency of the paper's MeZO step of Qwen2.5-0.5B on that chip (this
    efficiency predicts the nine other steps, with the paper's policy; the errors are the proxy's); and the time of our
    step with saved products at the same efficiency. With --measured DIR (results of step_table and per_layer), this
    machine's times are scaled by the ratio of the two rooflines, for the whole step and by phase.
    """
    options = _options(argv)
    phone = DEVICES[options.device]
    shapes = dict.fromkeys([CALIBRATED_BY[0], *options.shapes])
    workloads = {shape: workloads_of(shape, options.tokens) for shape in shapes}
    rates = Rates(phone.flops[2], phone.bandwidth)
    efficiency = efficiency_of(workloads[CALIBRATED_BY[0]], rates)
    if options.tokens != 256:
        efficiency = math.nan  # the paper's steps have 256 tokens
    cases = [(shape, engine) for shape in options.shapes for engine in ENGINES]
    rows = [row_of(shape, engine, workloads[shape], rates, efficiency) for shape, engine in cases]
    print("\n".join(f"assumed    {text}" for text in phone.assumptions))
    if not math.isnan(efficiency):
        shape, engine = CALIBRATED_BY
        print(f"calibrated the paper's {shape} {engine} step runs at {efficiency:.1%} of the roofline's speed")
    print(report.table(HEADS, [_line(row) for row in rows]))
    errors = [abs(r["error"]) for r in rows if r["error"] is not None and (r["shape"], r["engine"]) != CALIBRATED_BY]
    if errors and not math.isnan(efficiency):
        mean = sum(errors) / len(errors)
        print(f"predicted  {len(errors)} of the paper's steps: mean error {mean:.0%}, largest {max(errors):.0%}")
    more: dict[str, Any] = {"assumptions": phone.assumptions, "efficiency": efficiency}
    if options.measured is not None:
        more["scaled"] = _Scaled(options.measured, workloads, rates).rows
        heads = ["shape", "engine", "of", "measured s", "roofline ratio", f"on {phone.chip} s", "paper s"]
        print(report.table(heads, [list(row.values()) for row in more["scaled"]]))
    report.publish("projection", options, rows, None if math.isnan(efficiency) else draw, **more)


def _options(argv: Sequence[str]) -> Any:
    parser = report.parser("projection", projection.__doc__)
    parser.add_argument("--device", default="a17-pro", choices=list(DEVICES))
    parser.add_argument("--shapes", nargs="+", default=list(report.PAPER), choices=list(report.PAPER))
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    parser.add_argument("--measured", type=Path, help="folder with this machine's step_table.csv and per_layer.csv")
    options = parser.parse_args(argv)
    if options.measured is not None and not (options.measured / "step_table.csv").is_file():
        parser.error(
            f"--measured {options.measured}: contains no step_table.csv (python -m bench step_table --out DIR)"
        )
    return options


def workloads_of(shape: str, n_tokens: int, dtype: str = "bfloat16", weights: str = "packed") -> dict[str, Workload]:
    """The workload of each engine, from the shape's file headers only."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(shape, Path(scratch) / "model", sparse=True)
        model = mebp_mlx.open_model(folder, dtype, weights)
        lora = mebp_mlx.init_lora(model)
        exact = Workload(model, lora, 1, n_tokens)
        model.weights.close()
        return {
            "mezo": dataclasses.replace(exact, estimator=make_estimator("mezo", lora, seed=0, eps=1e-2)),
            "mebp": exact,
        }


def counted(workloads: dict[str, Workload], engine: str, policy: str) -> dict[str, Work]:
    saved = SAVE_INPUTS if policy == "the paper's" else SAVE_PRODUCTS
    return count(workloads[engine], Plan("block", saved, weight_block_bytes=None, head_block_bytes=None))


def efficiency_of(workloads: dict[str, Workload], rates: Rates) -> float:
    """The speed of the paper's step of CALIBRATED_BY, relative to the roofline."""
    shape, engine = CALIBRATED_BY
    return bound_s(counted(workloads, engine, "the paper's"), rates) / report.PAPER[shape][f"{engine}_s"]


def row_of(shape: str, engine: str, workloads: dict[str, Workload], rates: Rates, efficiency: float) -> dict[str, Any]:
    """A shape's step with an engine: counts, bounds, the times at this efficiency, and the paper's time."""
    ours, theirs = counted(workloads, engine, "ours"), counted(workloads, engine, "the paper's")
    total = sum(ours.values(), Work())
    paper_s = report.PAPER[shape][f"{engine}_s"]
    predicted_s = bound_s(theirs, rates) / efficiency
    return {
        "shape": shape,
        "engine": engine,
        "tokens": workloads[engine].T,
        "gflop": round(total.flops / 1e9, 1),
        "memory_gb": round(total.memory_bytes / 1e9, 3),
        "bound_s": round(bound_s(ours, rates), 4),
        "bound_by_phase_s": {phase: round(rates.bound_s(work), 4) for phase, work in ours.items()},
        "paper_policy_s": None if math.isnan(predicted_s) else round(predicted_s, 3),
        "paper_s": paper_s,
        "error": None if math.isnan(predicted_s) else round(predicted_s / paper_s - 1, 4),
        "ours_s": None if math.isnan(predicted_s) else round(bound_s(ours, rates) / efficiency, 3),
    }


def _line(row: dict[str, Any]) -> list[Any]:
    counts = [row["gflop"], row["memory_gb"], row["bound_s"], row["paper_policy_s"], row["paper_s"]]
    error = "-" if row["error"] is None else f"{row['error']:+.0%}"
    if row["error"] is not None and (row["shape"], row["engine"]) == CALIBRATED_BY:
        error = "calibrated"
    return [row["shape"], row["engine"], *counts, error, row["ours_s"]]


class _Scaled:
    """`rows`: this machine's times, multiplied by the ratio of the phone's bound to this machine's bound."""

    def __init__(self, folder: Path, workloads: dict[str, dict[str, Workload]], rates: Rates):
        self.workloads, self.rates = workloads, rates
        measured = run_child(["mebp_mlx.system.rates"], {}, offline=True)
        self.host = Rates(measured["flops"], measured["memory_bytes"])
        speeds = f"{self.host.flops / 1e9:,.0f} GFLOP/s in {measured['dtype']}, {self.host.memory_bytes / 1e9:.1f} GB/s"
        print(f"this host  {speeds}, measured now; weights decompressed")
        self.rows: list[dict[str, Any]] = []
        self._here: dict[str, dict[str, Workload]] = {}
        for row in report.read(folder, "step_table")[0]:
            if row["shape"] in workloads and row["engine"] in ENGINES and row["layers"] == "all":
                self._add(row["shape"], row["engine"], None, row["step_s"]["median"], row["tokens"], row.get("plan"))
        if (folder / "per_layer.csv").exists():
            self._add_phases(*report.read(folder, "per_layer"))

    def _add_phases(self, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
        settings = about["settings"]
        if settings["shape"] not in self.workloads or settings["layers"] is not None:
            return
        plan = about.get("totals", {}).get("mebp", {}).get("plan")
        for kind, phase in (("f", "forward"), ("h", "head"), ("b", "backward")):
            own = [row for row in rows if row["case"] == "mebp" and row["phase"].startswith(kind)]
            seconds = sum(row["ms"]["median"] for row in own) / 1e3
            self._add(settings["shape"], "mebp", phase, seconds, settings["tokens"], plan)

    def _add(self, shape: str, engine: str, phase: str | None, seconds: float, tokens: int, plan: Any) -> None:
        if tokens != self.workloads[shape][engine].T:
            return
        if plan is None:
            report.refuse(f"--measured: the result of {shape}, {engine} has no plan; measure it again")
        if shape not in self._here:
            self._here[shape] = workloads_of(shape, tokens, "float32", "decompressed")
        phone = counted(self.workloads[shape], engine, "ours")
        here = count(self._here[shape][engine], Plan.from_dict(plan))
        if phase is None:
            ratio = bound_s(phone, self.rates) / bound_s(here, self.host)
        else:
            ratio = self.rates.bound_s(phone[phase]) / self.host.bound_s(here[phase])
        self.rows.append(
            {
                "shape": shape,
                "engine": engine,
                "phase": phase or "step",
                "measured_s": round(seconds, 3),
                "ratio": round(ratio, 5),
                "scaled_s": round(seconds * ratio, 4),
                "paper_s": report.PAPER[shape][f"{engine}_s"] if phase is None else None,
            }
        )


def draw(plt: Any, rows: report.Rows, options: Any) -> tuple[Any, str]:
    """Bars: the paper's seconds, the predicted ones, and ours at the same efficiency; left MeZO, right MeBP."""
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True)
    series = (
        ("paper_s", "the paper, measured", "0.55"),
        ("paper_policy_s", "predicted, the paper's policy", "C0"),
        ("ours_s", "predicted, ours (products saved)", "C1"),
    )
    for axes, engine in zip(panels, ENGINES, strict=True):
        own = [row for row in rows if row["engine"] == engine]
        for number, (key, label, color) in enumerate(series):
            if engine == "mezo" and key == "ours_s":
                continue  # MeZO saves nothing, so both policies are equal
            at = [place + 0.27 * (number - 1) for place in range(len(own))]
            axes.bar(at, [row[key] for row in own], 0.27, label=label, color=color)
        axes.set_xticks(range(len(own)), [row["shape"] for row in own], rotation=20, ha="right")
        axes.grid(axis="x", visible=False)
        axes.set_title("MeZO" if engine == "mezo" else "MeBP", fontsize=9)
        axes.legend(fontsize=7, loc="upper left")
        axes.margins(y=0.2)
    panels[0].set_ylabel(f"seconds per step on {DEVICES[options.device].chip.partition(' (')[0]}")
    figure.suptitle(f"T = {options.tokens}, batch 1, rank 8: counted, then calibrated on the paper's MeZO at 0.5B")
    return figure, "a projection: nothing ran on a phone"


PICTURES = {"projection": draw}


def main(argv: Sequence[str] | None = None) -> None:
    projection(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    report.run(main)
