"""The paper's table of step time and memory: five shapes, MeZO and MeBP, each case in a process of its own.

Random weights and tokens, T = 256, batch 1, rank 8 on seven projections, SGD. The paper's figures are from an iPhone 15
Pro Max: memory and the ratio MeBP / MeZO compare, seconds do not.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from bench import report
from bench.step_case import add_device, device_arguments
from bench.stepper import plan_line
from mebp_mlx.system.phone import DEVICES
from mebp_mlx.testing.synth import SHAPES


def main() -> None:
    parser = report.parser("step_table", __doc__)
    parser.add_argument("--shapes", nargs="+", default=list(report.PAPER), choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--tokens", type=report.positive, default=256)
    parser.add_argument("--steps", type=report.positive, default=10, help="steps in the medians, after a first one")
    parser.add_argument("--models", type=Path, help="keep the random models in this folder (default: a temporary one)")
    add_device(parser)
    options = parser.parse_args()
    layers = None
    if options.quick:
        options.shapes, options.tokens, options.steps, layers = ["qwen2.5-0.5b", "gemma3-1b"], 64, 2, 2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes:
            folder = report.model_of(shape, options.models or Path(scratch), layers)
            how = ["--tokens", options.tokens, "--steps", options.steps, *device_arguments(options)]
            for engine in ("mezo", "mebp"):
                found = report.run_module("bench.step_case", folder, "--engine", engine, *how)
                rows.append({"shape": shape, "layers": layers or "all", **found})
                print(f"{shape} {engine}: {found['peak_mb']} MB, {found['step_s']['median']} s", flush=True)
                print(f"  plan     {plan_line(found['plan'])}", flush=True)
    print(report.table(HEADS, [_line(rows, shape) for shape in options.shapes]))
    if options.device:
        print("\n".join(f"assumed    {text}" for text in DEVICES[options.device].assumptions))
        heads = ["shape", "engine", f"least s on {DEVICES[options.device].chip}", "the paper s"]
        paper = [report.PAPER.get(row["shape"], {}).get(f"{row['engine']}_s") for row in rows]
        lines = [[r["shape"], r["engine"], r["device_bound_s"], s] for r, s in zip(rows, paper, strict=True)]
        print(report.table(heads, lines))
    about = report.context(options)
    plt = report.pyplot() if options.out else None
    if plt is not None:
        _draw(plt, rows, options, about)
    report.write("step_table", options, rows, paper=report.PAPER)


HEADS = ["shape", "LoRA", "MeZO MB", "paper", "MeBP MB", "paper", "MeZO s", "MeBP s", "MeBP / MeZO", "paper"]


def _line(rows: list[dict[str, Any]], shape: str) -> list[Any]:
    mezo, mebp = (next(r for r in rows if r["shape"] == shape and r["engine"] == e) for e in ("mezo", "mebp"))
    whole = mebp["layers"] == "all"  # else the paper's models are others
    paper = report.PAPER.get(shape, {}) if whole else {}
    seconds = [row["step_s"]["median"] for row in (mezo, mebp)]
    their_ratio = paper["mebp_s"] / paper["mezo_s"] if paper else None
    memory = [mezo["peak_mb"], paper.get("mezo_mb"), mebp["peak_mb"], paper.get("mebp_mb")]
    return [shape, mebp["n_lora_parameters"], *memory, *seconds, seconds[1] / seconds[0], their_ratio]


def _draw(plt: Any, rows: list[dict[str, Any]], options: Any, about: dict[str, Any]) -> None:
    """Bars: peak memory beside the paper's; a step's time over MeZO's beside the paper's."""
    figure, (memory, ratio) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=[3, 2])
    places = range(len(options.shapes))
    lines = [_line(rows, shape) for shape in options.shapes]
    series = [
        ("MeZO, the paper", 3, "0.8"),
        ("MeBP, the paper", 5, "0.55"),
        ("MeZO, here", 2, "C0"),
        ("MeBP, here", 4, "C1"),
    ]
    ratios = [("the paper", 9, "0.55"), ("here", 8, "C1")]
    for axes, bars in ((memory, series), (ratio, ratios)):
        bars = [bar for bar in bars if any(line[bar[1]] is not None for line in lines)]
        width = 0.8 / len(bars)
        for number, (label, column, color) in enumerate(bars):
            left = [place + width * (number - (len(bars) - 1) / 2) for place in places]
            axes.bar(left, [line[column] or 0 for line in lines], width, label=label, color=color)
        axes.set_xticks(list(places), options.shapes, rotation=20, ha="right")
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.25)
        axes.legend(fontsize=7, ncols=2, loc="upper left")
    memory.set_ylabel("peak footprint, MB")
    ratio.axhline(1, color="k", linewidth=0.6)
    ratio.set_ylabel("a step's time, MeBP / MeZO")
    figure.suptitle(f"T = {options.tokens}, batch 1, rank 8, SGD" + (", 2 blocks of each" if options.quick else ""))
    report.save_picture(plt, figure, options.out / "step_table.png", about, "random weights")


if __name__ == "__main__":
    main()
