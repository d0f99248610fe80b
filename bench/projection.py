"""The iPhone proxy: what a step should take on a phone's chip, from counted operations and bytes.

For each of the paper's shapes and each engine: the roofline's bound at the chip's published peaks, in 16 bits with
packed weights; the time at the efficiency that the paper's own MeZO step of Qwen2.5-0.5B had on that chip (one figure,
by which the nine others are then predicted, with the paper's policy: the errors are the proxy's own); and our step,
with its products saved, at that same efficiency. With --measured DIR (of bench.step_table and bench.per_layer) times
measured here are scaled by the ratio of the two rooflines, for the whole step and phase by phase.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import mebp_mlx
from bench import report
from mebp_mlx.engine.zeroth_order import make_estimator
from mebp_mlx.ops.plan import SAVE_INPUTS, SAVE_PRODUCTS, Plan
from mebp_mlx.planner.work import Rates, Work, bound_s, count
from mebp_mlx.planner.workload import Workload
from mebp_mlx.system.phone import DEVICES, Phone
from mebp_mlx.testing.synth import write_model

CALIBRATED_BY = ("qwen2.5-0.5b", "mezo")


def main() -> int:
    parser = report.parser("projection", __doc__)
    parser.add_argument("--device", default="a17-pro", choices=list(DEVICES))
    parser.add_argument("--shapes", nargs="+", default=list(report.PAPER), choices=list(report.PAPER))
    parser.add_argument("--tokens", type=report.positive, default=256)
    parser.add_argument("--measured", type=Path, help="folder of this machine's step_table.json, per_layer.json")
    options = parser.parse_args()
    if options.measured is not None and not (options.measured / "step_table.json").is_file():
        parser.error(f"argument --measured: {options.measured} holds no step_table.json (bench.step_table --out)")
    phone = DEVICES[options.device]
    workloads = {
        shape: _workloads(shape, options.tokens) for shape in dict.fromkeys([CALIBRATED_BY[0], *options.shapes])
    }
    rates = Rates(phone.flops[2], phone.bandwidth)
    shape, engine = CALIBRATED_BY
    efficiency = bound_s(_counted(workloads[shape], engine, "the paper's"), rates) / report.PAPER[shape][f"{engine}_s"]
    if options.tokens != 256:
        efficiency = math.nan  # the paper has one length
    rows = [_row(shape, engine, workloads[shape], rates, efficiency) for shape in options.shapes for engine in ENGINES]
    print("\n".join(f"assumed    {text}" for text in phone.assumptions))
    print(
        f"calibrated the paper's {shape} {engine} step is {efficiency:.1%} of the roofline's speed; "
        "all other figures in `at its efficiency` follow from that one"
    )
    print(report.table(HEADS, [_line(row) for row in rows]))
    errors = [abs(r["error"]) for r in rows if r["error"] is not None and (r["shape"], r["engine"]) != CALIBRATED_BY]
    if errors and not math.isnan(efficiency):
        mean = sum(errors) / len(errors)
        print(f"predicted  {len(errors)} of the paper's steps: off by {mean:.0%}, at most {max(errors):.0%}")
    scaled: list[dict[str, Any]] = []
    if options.measured is not None:
        scaled = _scaled(options.measured, workloads, phone, rates)
    about = report.context(options)
    plt = report.pyplot() if options.out else None
    if plt is not None and not math.isnan(efficiency):
        _draw(plt, rows, phone, options, about)
    more = {"device": phone.name, "assumptions": phone.assumptions, "efficiency": efficiency, "scaled": scaled}
    report.write("projection", options, rows, **more)
    return 0


ENGINES = ("mezo", "mebp")
HEADS = [
    *("shape", "engine", "GFLOP", "GB", "bound s"),
    *("at its efficiency", "the paper s", "error", "ours s"),
]


def _workloads(shape: str, n_tokens: int, dtype: str = "bfloat16", weights: str = "packed") -> dict[str, Workload]:
    """What each engine has to do, from the shape's headers alone."""
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


def _counted(workloads: dict[str, Workload], engine: str, policy: str) -> dict[str, Work]:
    saved = SAVE_INPUTS if policy == "the paper's" else SAVE_PRODUCTS
    return count(workloads[engine], Plan("block", saved, weight_block_bytes=None, head_block_bytes=None))


def _row(shape: str, engine: str, workloads: dict[str, Workload], rates: Rates, efficiency: float) -> dict[str, Any]:
    ours, theirs = _counted(workloads, engine, "ours"), _counted(workloads, engine, "the paper's")
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
    if (row["shape"], row["engine"]) == CALIBRATED_BY:
        error = "calibrated"
    return [row["shape"], row["engine"], *counts, error, row["ours_s"]]


def _scaled(folder: Path, workloads: dict[str, Any], phone: Phone, rates: Rates) -> list[dict[str, Any]]:
    """Times of this machine, each times the ratio of its bound there to its bound here."""
    from mebp_mlx.system.child import run_child

    found = run_child(["mebp_mlx.system.rates"], {}, offline=True)
    host, rows = Rates(found["flops"], found["memory_bytes"]), []
    print(
        f"this host  {host.flops / 1e9:,.0f} GFLOP/s in {found['dtype']}, {host.memory_bytes / 1e9:.1f} GB/s, "
        "measured now; weights decompressed"
    )
    here: dict[str, dict[str, Workload]] = {}

    def add(shape: str, engine: str, phase: str | None, seconds: float, tokens: int, plan: dict[str, Any]) -> None:
        if tokens not in (workloads[shape][engine].T,):
            return
        if shape not in here:
            here[shape] = _workloads(shape, tokens, "float32", "decompressed")
        there, mine = _counted(workloads[shape], engine, "ours"), count(here[shape][engine], Plan.from_dict(plan))
        if phase is None:
            ratio = bound_s(there, rates) / bound_s(mine, host)
        else:
            ratio = rates.bound_s(there[phase]) / host.bound_s(mine[phase])
        rows.append(
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

    for row in json.loads((folder / "step_table.json").read_text())["rows"]:
        if row["shape"] in workloads and row["engine"] in ENGINES and row["layers"] == "all":
            add(row["shape"], row["engine"], None, row["step_s"]["median"], row["tokens"], row["plan"])
    phases = folder / "per_layer.json"
    if phases.exists():
        found = json.loads(phases.read_text())
        options = found["options"]
        for kind, phase in (("f", "forward"), ("h", "head"), ("b", "backward")):
            if options["shape"] in workloads and options["layers"] is None:
                own = [r for r in found["rows"] if r["case"] == "mebp" and r["phase"].startswith(kind)]
                seconds = sum(r["ms"]["median"] for r in own) / 1e3
                plan = found["totals"]["mebp"]["plan"]
                add(options["shape"], "mebp", phase, seconds, options["tokens"], plan)
    heads = ["shape", "engine", "of", "measured here s", "roofline there / here", f"on {phone.chip} s", "the paper s"]
    print(report.table(heads, [list(row.values()) for row in rows]))
    return rows


def _draw(plt: Any, rows: list[dict[str, Any]], phone: Phone, options: Any, about: dict[str, Any]) -> None:
    """Bars: the paper's seconds, predicted ones, and ours at the same efficiency; MeZO left, MeBP right."""
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
                continue  # the same forward passes
            at = [place + 0.27 * (number - 1) for place in range(len(own))]
            axes.bar(at, [row[key] for row in own], 0.27, label=label, color=color)
        axes.set_xticks(range(len(own)), [row["shape"] for row in own], rotation=20, ha="right")
        axes.grid(axis="x", visible=False)
        axes.set_title("MeZO" if engine == "mezo" else "MeBP", fontsize=9)
        axes.legend(fontsize=7, loc="upper left")
        axes.margins(y=0.2)
    panels[0].set_ylabel(f"seconds a step on {phone.chip.partition(' (')[0]}")
    figure.suptitle(f"T = {options.tokens}, batch 1, rank 8: counted, then calibrated on the paper's MeZO at 0.5B")
    report.save_picture(plt, figure, options.out / "projection.png", about, "a projection: nothing here ran on a phone")


if __name__ == "__main__":
    sys.exit(main())
