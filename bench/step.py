"""Footprint and time of whole training steps: step, step_table, sequence_length, scaling, hard_limit.

Models have real shapes and random weights; batch 1, LoRA on seven projections. Each case runs in its own process
(bench/case.py), which is measured as a whole, with the interpreter and planning. Medians exclude the first step. The
paper's figures are from an iPhone 15 Pro Max: memory and ratios are comparable, seconds are not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import report
from bench.case import add_limits, limit_flags, plan_line
from mebp_mlx.system.phone import DEVICES
from mebp_mlx.testing.synth import SHAPES

REQUIRED_MB = {1024: 160, 4096: 320, 8192: 512}  # the limits of this project for qwen2.5-0.5b, by T


def _add_shapes(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    names = ", ".join(default)
    shown = f"one or more of {', '.join(SHAPES)} (default: {names})"
    parser.add_argument("--shapes", nargs="+", default=list(default), choices=list(SHAPES), metavar="SHAPE", help=shown)


def _cases(folder: Path, options: Any, *flags: Sequence[object], may_fail: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the results of a model's cases, one for each list of flags; prints each plan."""
    for given in flags:
        result = report.run_module("bench.case", folder, *given, *limit_flags(options), may_fail=may_fail)
        if "error" not in result:
            print(f"plan       {folder.name} {' '.join(map(str, given))}: {plan_line(result['plan'])}", flush=True)
        yield result


def step(argv: Sequence[str]) -> None:
    """A training step, compared with two forward passes of the same code (MeZO needs two)."""
    parser = report.Parser("step", step.__doc__)
    _add_shapes(parser, ["qwen2.5-0.5b"])
    parser.add_argument("--layers", type=report.positive, help="number of blocks (default: all)")
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"], choices=["sgd", "adamw"])
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    parser.add_argument("--rank", type=report.positive, default=8)
    parser.add_argument("--steps", type=report.positive, default=5, help="steps in the medians, after a first one")
    parser.add_argument("--no-forwards", action="store_true", help="measure only steps, without the ratio")
    report.add_models(parser)
    add_limits(parser)
    options = parser.parse_args(argv)
    how = ["--tokens", options.tokens, "--rank", options.rank, "--steps", options.steps]
    how += [] if options.no_forwards else ["--forwards"]
    rows, lines = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes:
            folder = report.model_of(shape, options.models or Path(scratch), options.layers)
            flags = [["--optimizer", optimizer, *how] for optimizer in options.optimizers]
            for result in _cases(folder, options, *flags):
                rows.append({"shape": shape, "layers": options.layers or "all", **result})
                paper = report.PAPER.get(shape, {}).get("mebp_mb") if options.layers is None else None
                keys = ("step_s", "two_forwards_s", "ratio")
                medians = [result[key]["median"] if key in result else None for key in keys]
                lines.append([shape, result["optimizer"], result["before_mb"], result["peak_mb"], paper, *medians])
    heads = ["shape", "optimizer", "before MB", "peak MB", "paper MB", "step s", "2 forwards s", "ratio"]
    print(report.table(heads, lines))
    print(json.dumps({"bench": "step", "command": options.command, "results": rows}))


def hard_limit(argv: Sequence[str]) -> int:
    """One step of each shape under an operating-system limit on the process's private memory (Linux only).

    RLIMIT_DATA counts reserved private writable memory, used or not, so it is never below the footprint.
    """
    parser = report.Parser("hard_limit", hard_limit.__doc__)
    _add_shapes(parser, ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "gemma3-1b", "gemma3-4b", "qwen2.5-7b"])
    parser.add_argument("--layers", type=report.positive, help="number of blocks (default: all)")
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    add_limits(parser)
    parser.set_defaults(limit_mb=1000)
    options = parser.parse_args(argv)
    rows, lines = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes:  # all weights are zero, so the sparse files need no disk space
            folder = report.model_of(shape, Path(scratch), options.layers, sparse=True)
            for result in _cases(folder, options, ["--tokens", options.tokens, "--steps", 0], may_fail=True):
                rows.append({"shape": shape, "limit_mb": options.limit_mb, **result})
                figures = [result.get("peak_mb"), result.get("first_step_s"), result.get("error", "ok")]
                lines.append([shape, options.limit_mb, *figures])
    print(report.table(["shape", "limit MB", "peak MB", "step s", ""], lines))
    print(json.dumps({"bench": "hard_limit", "command": options.command, "results": rows}))
    return 1 if any("error" in row for row in rows) else 0


def scaling(argv: Sequence[str]) -> None:
    """Peak footprint by number of layers and by sequence length, with and without the LoRA parameters."""
    parser = report.Parser("scaling", scaling.__doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument(
        "--layers", type=report.positive, nargs="*", default=[3, 6, 12, 24], help="numbers of layers at T = 256"
    )
    parser.add_argument("--tokens", type=report.positive, nargs="*", default=[256, 1024, 4096, 8192])
    parser.add_argument("--depth", type=report.positive, help="layers of the --tokens cases (default: all)")
    parser.add_argument("--rank", type=report.positive, default=8)
    add_limits(parser)
    options = parser.parse_args(argv)
    sizes = [(n_layers, 256) for n_layers in options.layers]
    sizes += [(options.depth, T) for T in options.tokens if (options.depth, T) not in sizes]
    rows, lines = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for n_layers, T in sizes:
            folder = report.model_of(options.shape, Path(scratch), n_layers)
            for result in _cases(folder, options, ["--tokens", T, "--rank", options.rank, "--steps", 0]):
                less_lora = round(result["peak_mb"] - 4e-6 * result["n_lora_parameters"], 1)
                required = REQUIRED_MB.get(T) if options.shape == "qwen2.5-0.5b" else None
                depth = n_layers or "all"
                rows.append({"layers": depth, "peak_less_lora_mb": less_lora, **result})
                lines.append([depth, T, result["peak_mb"], less_lora, required, result["first_step_s"]])
    print(report.table(["layers", "T", "peak MB", "MB without LoRA", "required MB", "step s"], lines))
    print(json.dumps({"bench": "scaling", "command": options.command, "results": rows}))


def step_table(argv: Sequence[str]) -> None:
    """The paper's table of time and memory per step: five shapes, MeZO and MeBP."""
    parser = report.parser("step_table", step_table.__doc__)
    _add_shapes(parser, list(report.PAPER))
    parser.add_argument("--layers", type=report.positive, help="number of blocks (default: all)")
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    parser.add_argument("--steps", type=report.positive, default=10, help="steps in the medians, after a first one")
    report.add_models(parser)
    add_limits(parser)
    options = parser.parse_args(argv)
    if options.quick:
        options.shapes, options.tokens, options.steps, options.layers = ["qwen2.5-0.5b", "gemma3-1b"], 64, 2, 2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes:
            folder = report.model_of(shape, options.models or Path(scratch), options.layers)
            how = ["--tokens", options.tokens, "--steps", options.steps]
            for result in _cases(folder, options, *(["--engine", engine, *how] for engine in ("mezo", "mebp"))):
                rows.append({"shape": shape, "layers": options.layers or "all", **result})
    print(report.table(TABLE_HEADS, [_table_line(rows, shape) for shape in options.shapes]))
    if options.device:
        print("\n".join(f"assumed    {text}" for text in DEVICES[options.device].assumptions))
        heads = ["shape", "engine", f"bound on {DEVICES[options.device].chip}, s", "paper s"]
        paper = [report.PAPER.get(row["shape"], {}).get(f"{row['engine']}_s") for row in rows]
        lines = [[r["shape"], r["engine"], r["device_bound_s"], s] for r, s in zip(rows, paper, strict=True)]
        print(report.table(heads, lines))
    report.publish("step_table", options, rows, draw_table)


TABLE_HEADS = ["shape", "LoRA", "MeZO MB", "paper", "MeBP MB", "paper", "MeZO s", "MeBP s", "MeBP / MeZO", "paper"]


def _table_line(rows: report.Rows, shape: str) -> list[Any]:
    mezo, mebp = (next(r for r in rows if r["shape"] == shape and r["engine"] == e) for e in ("mezo", "mebp"))
    whole = mebp["layers"] == "all"  # the paper has only whole models
    paper = report.PAPER.get(shape, {}) if whole else {}
    seconds = [row["step_s"]["median"] for row in (mezo, mebp)]
    paper_ratio = paper["mebp_s"] / paper["mezo_s"] if paper else None
    memory = [mezo["peak_mb"], paper.get("mezo_mb"), mebp["peak_mb"], paper.get("mebp_mb")]
    return [shape, mebp["n_lora_parameters"], *memory, *seconds, seconds[1] / seconds[0], paper_ratio]


def draw_table(plt: Any, rows: report.Rows, options: Any) -> tuple[Any, str]:
    """Bars: peak memory, and MeBP's time divided by MeZO's, next to the paper's."""
    figure, (memory, ratio) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=[3, 2])
    places = range(len(options.shapes))
    lines = [_table_line(rows, shape) for shape in options.shapes]
    series = [
        ("MeZO, the paper", 3, "0.8"),
        ("MeBP, the paper", 5, "0.55"),
        ("MeZO, this machine", 2, "C0"),
        ("MeBP, this machine", 4, "C1"),
    ]
    ratios = [("the paper", 9, "0.55"), ("this machine", 8, "C1")]
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
    ratio.set_ylabel("time per step, MeBP / MeZO")
    figure.suptitle(f"T = {options.tokens}, batch 1, rank 8, SGD" + (", 2 blocks of each" if options.quick else ""))
    return figure, "random weights"


def sequence_length(argv: Sequence[str]) -> None:
    """Peak footprint and time per step of MeBP by sequence length, compared with a re-measurement of the paper's."""
    parser = report.parser("sequence_length", sequence_length.__doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--layers", type=report.positive, help="number of blocks (default: all)")
    parser.add_argument("--tokens", type=report.positive, nargs="+", default=[128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=report.positive, default=1, help="steps in the medians, after a first one")
    report.add_models(parser)
    add_limits(parser)
    options = parser.parse_args(argv)
    if options.quick:
        options.tokens, options.steps, options.layers = [64, 128, 256], 1, 2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = report.model_of(options.shape, options.models or Path(scratch), options.layers)
        for result in _cases(folder, options, *(["--tokens", T, "--steps", options.steps] for T in options.tokens)):
            rows.append({"shape": options.shape, "layers": options.layers or "all", **result})
    paper, lines = _paper_by_length(options, rows), []
    for row in rows:
        T, step_s = row["tokens"], row["step_s"]["median"]
        lines.append([T, row["peak_mb"], paper.get(T), step_s, 1e3 * step_s / T])
    print(report.table(["T", "peak MB", "paper's MeBP MB", "s per step", "ms per token"], lines))
    report.publish("sequence_length", options, rows, draw_lengths)


def _paper_by_length(options: Any, rows: report.Rows) -> dict[int, float]:
    whole = options.shape == "qwen2.5-0.5b" and rows[0]["layers"] == "all"
    return dict(report.PAPER_BY_LENGTH_MB) if whole else {}


def draw_lengths(plt: Any, rows: report.Rows, options: Any) -> tuple[Any, str]:
    """Lines: peak memory and time per step by sequence length."""
    figure, (memory, time) = plt.subplots(1, 2, figsize=(8.5, 3.4))
    T, paper = [row["tokens"] for row in rows], _paper_by_length(options, rows)
    memory.plot(T, [row["peak_mb"] for row in rows], "o-", color="C1", label="this machine")
    if paper:
        label = "the paper's MeBP, re-measured"
        memory.plot(list(paper), list(paper.values()), "s--", color="0.5", label=label)
    memory.set_ylabel("peak footprint, MB")
    memory.set_ylim(bottom=0)
    memory.legend(fontsize=7, loc="center right")
    time.plot(T, [row["step_s"]["median"] for row in rows], "o-", color="C1")
    time.set_ylabel("seconds per step")
    time.set_ylim(bottom=0)
    for axes in (memory, time):
        axes.set_xscale("log", base=2)
        ticks = sorted({*T, *paper})
        axes.set_xticks(ticks, [f"{t:,}" for t in ticks], rotation=30)
        axes.minorticks_off()
        axes.set_xlabel("tokens per sequence")
    figure.suptitle(f"{options.shape}{', 2 blocks' if options.quick else ''}, batch 1, rank 8, SGD")
    return figure, "random weights"


PICTURES = {"step_table": draw_table, "sequence_length": draw_lengths}
BENCHES: dict[str, report.Bench] = {
    "step": step,
    "step_table": step_table,
    "sequence_length": sequence_length,
    "scaling": scaling,
    "hard_limit": hard_limit,
}


def main(argv: Sequence[str] | None = None) -> object:
    return report.pick(BENCHES, argv, default="step")


if __name__ == "__main__":
    report.run(main)
