"""Footprint and step time against the sequence's length, MeBP, beside an independent re-measurement of the paper's.

Qwen2.5-0.5B's shape by default, 128 to 8,192 tokens, random weights, batch 1, rank 8, SGD; a process a case.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import report
from bench.stepper import add_memory_budget, plan_line
from mebp_mlx.testing.synth import SHAPES


def main() -> None:
    parser = report.parser("sequence_length", __doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--tokens", type=report.positive, nargs="+", default=[128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=report.positive, default=1, help="steps in the medians, after a first one")
    parser.add_argument("--models", type=Path, help="keep the random model in this folder (default: a temporary one)")
    add_memory_budget(parser)
    options = parser.parse_args()
    layers = None
    if options.quick:
        options.tokens, options.steps, layers = [64, 128, 256], 1, 2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = report.model_of(options.shape, options.models or Path(scratch), layers)
        how = ("--steps", options.steps, "--memory-budget", options.memory_budget)
        for T in options.tokens:
            found = report.run_module("bench.step_case", folder, "--tokens", T, *how)
            rows.append({"shape": options.shape, "layers": layers or "all", **found})
            print(f"T = {T:,}: {found['peak_mb']} MB, {found['step_s']['median']} s", flush=True)
            print(f"  plan     {plan_line(found['plan'])}", flush=True)
    paper = report.PAPER_BY_LENGTH_MB if options.shape == "qwen2.5-0.5b" and layers is None else {}
    heads = ["T", "peak MB", "paper's MeBP MB", "s a step", "ms a token"]
    lines = [
        [
            r["tokens"],
            r["peak_mb"],
            paper.get(r["tokens"]),
            r["step_s"]["median"],
            1e3 * r["step_s"]["median"] / r["tokens"],
        ]
        for r in rows
    ]
    print(report.table(heads, lines))
    about = report.context(options)
    plt = report.pyplot() if options.out else None
    if plt is not None:
        _draw(plt, rows, paper, options, about)
    report.write("sequence_length", options, rows, paper_mb=paper)


def _draw(plt: Any, rows: list[dict[str, Any]], paper: Mapping[int, float], options: Any, about: Any) -> None:
    figure, (memory, time) = plt.subplots(1, 2, figsize=(8.5, 3.4))
    T = [row["tokens"] for row in rows]
    memory.plot(T, [row["peak_mb"] for row in rows], "o-", color="C1", label="here")
    if paper:
        memory.plot(list(paper), list(paper.values()), "s--", color="0.5", label="the paper's MeBP, re-measured")
    memory.set_ylabel("peak footprint, MB")
    memory.set_ylim(bottom=0)
    memory.legend(fontsize=7)
    time.plot(T, [row["step_s"]["median"] for row in rows], "o-", color="C1")
    time.set_ylabel("seconds a step")
    time.set_ylim(bottom=0)
    for axes in (memory, time):
        axes.set_xscale("log", base=2)
        ticks = sorted({*T, *paper})
        axes.set_xticks(ticks, [f"{t:,}" for t in ticks], rotation=30)
        axes.minorticks_off()
        axes.set_xlabel("tokens in the sequence")
    figure.suptitle(f"{options.shape}{', 2 blocks' if options.quick else ''}, batch 1, rank 8, SGD")
    report.save_picture(plt, figure, options.out / "sequence_length.png", about, "random weights")


if __name__ == "__main__":
    main()
