"""The paper's Figure 2: memory and wall-clock phase by phase: emb, f0 to fN, head, bN to b0.

MeBP with the products saved (the default), with block inputs only (the paper's policy: all else is recomputed) and
MeZO, a process each, on random weights, with the trainer's own budget. Times are split into reading, decompressing,
computing and what is kept; memory is that of a step whose C heap is trimmed after each phase (bench/layers.py says
how). Besides CSV, JSON and PNG, --out gets per_layer.html, which opens without a network.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from bench import report
from bench.layers import CASES, SPLITS
from bench.stepper import add_memory_budget, plan_line
from mebp_mlx.testing.synth import SHAPES

COLORS = {"mebp": "C1", "mebp-inputs": "C2", "mezo": "C0"}
SPLIT_COLORS = {"read": "#7f7f7f", "decompress": "#d62728", "compute": "#4c78a8", "save": "#f2b701"}
PAGE = Path(__file__).with_name("per_layer.html")


def main() -> None:
    parser = report.parser("per_layer", __doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--layers", type=report.positive, help="blocks (default: all)")
    parser.add_argument("--tokens", type=report.positive, default=256)
    parser.add_argument("--steps", type=report.positive, default=3, help="steps of each kind, after a first one")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--models", type=Path, help="keep the random model in this folder (default: a temporary one)")
    add_memory_budget(parser, None, "as the trainer's")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.tokens, options.steps = 2, 64, 1
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = report.model_of(options.shape, options.models or Path(scratch), options.layers)
        how = ["--tokens", options.tokens, "--steps", options.steps]
        how += [] if options.memory_budget is None else ["--memory-budget", options.memory_budget]
        for case in options.cases:
            found[case] = report.run_module("bench.layers", folder, "--case", case, *how)
            print(f"{case}: {found[case]['peak_mb']} MB, {found[case]['step_ms']['median']:,.0f} ms a step", flush=True)
            print(f"  plan     {plan_line(found[case]['plan'])}", flush=True)
    print(report.table(HEADS, [line for case in found.values() for line in _lines(case)]))
    about = report.context(options)
    plt = report.pyplot() if options.out else None
    if plt is not None:
        _draw(plt, found, options, about)
    totals = {case: {k: v for k, v in each.items() if k != "phases"} for case, each in found.items()}
    rows = [row for each in found.values() for row in each["phases"]]
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        data = {"title": _title(options), "machine": report.machine_label(about), "labels": CASES, "rows": rows}
        data |= {"splits": SPLIT_COLORS}
        text = PAGE.read_text(encoding="utf-8").replace("/*DATA*/", json.dumps(data).replace("</", "<\\/"))
        (options.out / "per_layer.html").write_text(text, encoding="utf-8")
    report.write("per_layer", options, rows, totals=totals)


HEADS = ["case", "phases", "number", "ms", "of a step", "peak MB", "arrays MB", *SPLITS]


def _lines(found: dict[str, Any]) -> list[list[Any]]:
    """A line for each kind of phase: all of its phases' time together, and the share of each part in it."""
    lines = []
    for kind, what in (("e", "embedding"), ("f", "blocks forward"), ("h", "head"), ("b", "blocks backward")):
        rows: list[dict[str, Any]] = [row for row in found["phases"] if row["phase"].startswith(kind)]
        if not rows:
            continue
        ms: float = sum(row["ms"]["median"] for row in rows)
        split = [float(sum(row["split_ms"][part] for row in rows)) for part in SPLITS]
        peak, arrays = (max(row[key] for row in rows) for key in ("peak_mb", "arrays_mb"))
        shares = [f"{part / sum(split):.0%}" for part in split]
        share = f"{ms / found['step_ms']['median']:.0%}"
        lines.append([CASES[found["case"]], what, len(rows), round(ms), share, peak, arrays, *shares])
    return lines


def _title(options: Any) -> str:
    what = f"{options.shape}, {options.layers} blocks" if options.layers else options.shape
    return f"{what}: T = {options.tokens}, batch 1, rank 8, SGD"


def _draw(plt: Any, found: dict[str, Any], options: Any, about: dict[str, Any]) -> None:
    """Memory above, time below, split; one x axis: the longest list of phases."""
    from matplotlib.patches import Patch

    order = max(([row["phase"] for row in each["phases"]] for each in found.values()), key=len)
    place = {phase: number for number, phase in enumerate(order)}
    figure, (memory, time) = plt.subplots(2, 1, figsize=(max(8, min(13, 0.22 * len(order) + 3)), 6.4), sharex=True)
    width, blocks = 0.84 / len(found), 0.0
    for number, (case, each) in enumerate(found.items()):
        rows = each["phases"]
        x = [place[row["phase"]] for row in rows]
        memory.plot(x, [row["peak_mb"] for row in rows], ".-", markersize=3, color=COLORS[case], label=CASES[case])
        arrays, last = [row["arrays_mb"] for row in rows], number == len(found) - 1
        memory.plot(x, arrays, ":", color=COLORS[case], label="dotted: MLX's arrays" if last else None)
        beside = [at + width * (number - (len(found) - 1) / 2) for at in x]
        total = [0.0] * len(rows)
        for part in SPLITS:
            values = [row["split_ms"][part] for row in rows]
            color, edge = SPLIT_COLORS[part], COLORS[case]
            time.bar(beside, values, width, bottom=total, color=color, edgecolor=edge, linewidth=0.4)
            total = [low + value for low, value in zip(total, values, strict=True)]
        blocks = max([blocks, *(t for t, row in zip(total, rows, strict=True) if row["phase"] != "head")])
        head = next(n for n, row in enumerate(rows) if row["phase"] == "head")
        time.annotate(
            f"{total[head]:,.0f} ms",
            (place["head"], 1),
            xycoords=("data", "axes fraction"),
            xytext=(9 + 0.3 * 72 * width * len(found), -11 - 10 * number),
            textcoords="offset points",
            color=COLORS[case],
            fontsize=7,
        )
    memory.set_ylabel("peak within the phase, MB")
    memory.set_ylim(bottom=0)
    memory.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    time.set_ylabel("milliseconds")
    time.set_ylim(0, 1.7 * blocks)  # the head's bars go beyond; their sums are written beside them
    parts = [Patch(facecolor=SPLIT_COLORS[part], label=part) for part in SPLITS]
    edges = [Patch(facecolor="none", edgecolor=COLORS[case], label=CASES[case]) for case in found]
    handles = [*parts, *edges]
    time.legend(handles=handles, fontsize=7, ncols=len(handles), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    every = len(order) // 30 + 1
    shown = [phase for n, phase in enumerate(order) if phase in ("emb", "head") or n % every == 1 % every]
    time.set_xticks([place[phase] for phase in shown], shown, fontsize=7)
    time.set_xlabel("phase: embedding, blocks forward, head, blocks backward")
    for axes in (memory, time):
        axes.grid(axis="x", visible=False)
    time.set_xlim(-0.8, len(order) - 0.2)
    figure.suptitle(_title(options))
    report.save_picture(plt, figure, options.out / "per_layer.png", about, "random weights")


if __name__ == "__main__":
    main()
