"""Ours, mlx-lm's trainer with packed and with decompressed weights, and whole-graph checkpointing in both orders.

The same rows, seeds, precision (float32), optimizer (Adam) and BLAS for all; processes by turns, a few rounds, so
that a busy machine is busy for everybody. All of them compute exact gradients: their losses after N steps must agree.

    python -m bench.versus                                     # the bundled model on its text
    python -m bench.versus --shape qwen2.5-0.5b --layers 4     # a real shape's blocks and head, random weights
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from bench import report
from bench.versus_case import CASES
from mebp_mlx.testing.synth import SHAPES, write_model


def main() -> None:
    parser = report.parser("versus", __doc__)
    parser.add_argument("--model", default="bundled", help="folder, hub id, or `bundled`")
    parser.add_argument("--data", default="bundled", help="folder, hub id, or `bundled`")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights and tokens, no --model and --data")
    parser.add_argument("--layers", type=report.positive, help="blocks of --shape (default: all)")
    parser.add_argument("--steps", type=report.positive, default=20)
    parser.add_argument("--batch-size", type=report.positive, default=4)
    parser.add_argument("--tokens", type=report.positive, default=128)
    parser.add_argument("--rounds", type=report.positive, default=3)
    parser.add_argument("--without", nargs="*", default=[], choices=list(CASES), help="contestants to leave out")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rounds, options.batch_size, options.tokens = 4, 1, 1, 64
    cases = [case for case in CASES if case not in options.without]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model
        if options.shape:
            model = write_model(options.shape, Path(scratch) / options.shape, layers=options.layers)
        how = ["--steps", options.steps, "--batch-size", options.batch_size, "--tokens", options.tokens]
        for number in range(options.rounds):
            for case in cases:
                found = report.run_module("bench.versus_case", model, "--case", case, "--data", options.data, *how)
                runs.append({"round": number, **found})
                print(f"round {number + 1}: {case}: {found['step_s']['median']} s, {found['peak_mb']} MB", flush=True)
    rows = [_joined(case, runs) for case in cases]
    first = rows[0]["step_s"]["median"]
    heads = ["", "s a step", "over the first", "peak MB", f"loss of step {options.steps}"]
    print(report.table(heads, [_line(row, first) for row in rows]))
    about = report.context(options)
    plt = report.pyplot() if options.out else None
    if plt is not None:
        _draw(plt, rows, options, about)
    report.write("versus", options, rows, runs=runs)


def _line(row: dict[str, Any], first_s: float) -> list[Any]:
    seconds = row["step_s"]["median"]
    return [row["what"], seconds, seconds / first_s, row["peak_mb"], f"{row['last_loss']:.5f}"]


def _joined(case: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    own = [run for run in runs if run["case"] == case]
    return {
        "case": case,
        "what": CASES[case],
        "step_s": report.spread([run["step_s"]["median"] for run in own]),
        "peak_mb": max(run["peak_mb"] for run in own),
        "first_loss": own[0]["first_loss"],
        "last_loss": own[0]["last_loss"],
    }


def _draw(plt: Any, rows: list[dict[str, Any]], options: Any, about: dict[str, Any]) -> None:
    figure, (memory, time) = plt.subplots(1, 2, figsize=(10, 2.9), sharey=True)
    names = [row["what"].replace(", ", ",\n", 1) for row in rows]
    for axes, values, label in (
        (memory, [row["peak_mb"] for row in rows], "peak footprint, MB"),
        (time, [row["step_s"]["median"] for row in rows], "seconds a step"),
    ):
        bars = axes.barh(names, values, color=["C1", *["C0"] * (len(rows) - 1)])
        axes.bar_label(bars, labels=[f"{value:,.3g}" for value in values], padding=3, fontsize=7)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)
    memory.invert_yaxis()
    memory.tick_params(axis="y", labelsize=7)
    what = options.model if not options.shape else f"{options.shape}, {options.layers or 'all'} blocks"
    figure.suptitle(f"{what}: {options.batch_size} rows of {options.tokens} tokens, rank 8, Adam, float32")
    report.save_picture(plt, figure, options.out / "versus.png", about)


if __name__ == "__main__":
    main()
