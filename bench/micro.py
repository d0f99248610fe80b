"""Single parts of a step: head, decompression, blas, open_cost (`python -m bench NAME`)."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mebp_mlx  # isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx
import numpy as np

from bench import report
from bench.phases import SPLIT_COLORS, SPLITS, trim_heap
from mebp_mlx.kernels.cpu import online_softmax
from mebp_mlx.kernels.online_softmax import SoftmaxState
from mebp_mlx.model.base import Model
from mebp_mlx.model.config import Linear
from mebp_mlx.model.lora import Adapter
from mebp_mlx.ops.cross_entropy import cross_entropy
from mebp_mlx.ops.plan import Context, Plan
from mebp_mlx.system.footprint import PeakMeter, footprint_bytes
from mebp_mlx.system.machine import load_blas, machine
from mebp_mlx.testing.synth import SHAPES
from mebp_mlx.weights.safetensors import MappedWeights

PAPER_SHARE = (0.32, 0.42)  # share of decompression in a step on an iPhone, from the paper
HEAD_ROWS = 8192
BLAS_SHAPE = (256, 896, 4864)  # T, D, F of Qwen2.5-0.5B


# ----------------------------------------------------------------------------------------------- head


def measure_head(folder: Path, n_tokens: int, repeats: int) -> dict[str, float]:
    """Median seconds of the head and of its products, their median ratio, and the MB that the head adds."""
    model, plan = mebp_mlx.open_model(folder), Plan()
    D, V = model.spec.D, model.spec.V
    rng = np.random.default_rng(0)
    targets = rng.integers(0, V, (1, n_tokens)).astype(np.int32)
    x = mx.array(rng.standard_normal((1, n_tokens, D), np.float32))
    chunk = plan.vocabulary_chunk(n_tokens, model.copied_bytes(model.spec.head, D), model.dtype.size)

    def whole() -> float:
        began_s = time.perf_counter()
        cross_entropy(Context(model, plan, Adapter({}, 1.0, 0.0)), [x], targets, need_dx=True)
        return time.perf_counter() - began_s

    def products() -> float:
        h, w = x[0], mx.random.normal((chunk, D))
        mx.eval(h, w)
        began_s = time.perf_counter()
        for _ in range(V // chunk):
            z = h @ w.T
            mx.eval(z)
            mx.eval(z @ w)
        return (time.perf_counter() - began_s) * V / (V // chunk * chunk)

    def decompress() -> float:
        began_s = time.perf_counter()
        for first in range(0, V, chunk):
            mx.eval(model.rows(model.spec.head, first, min(first + chunk, V)))
        return time.perf_counter() - began_s

    def exp() -> float:
        state, labels = SoftmaxState.start(n_tokens, D, False), mx.array(targets[0])
        began_s = time.perf_counter()
        for _ in range(V // chunk):
            step = online_softmax(mx.zeros((n_tokens, chunk)), *state.softmax, labels, 0)
            mx.eval(step)
        return (time.perf_counter() - began_s) * V / (V // chunk * chunk)

    products()  # the BLAS allocates its buffers, which do not belong to the head
    trim_heap()  # releases the memory that the setup has freed
    with PeakMeter() as meter:
        before_bytes = meter.now_bytes
        with meter.phase("head"):
            whole()
        added_bytes = meter.phases["head"] - before_bytes
    pairs = [(whole(), products()) for _ in range(repeats)]
    parts = {"decompress_s": decompress, "exp_s": exp}
    parts_s = {name: round(statistics.median(part() for _ in range(repeats)), 3) for name, part in parts.items()}
    head_s, products_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "head_s": round(head_s, 3),
        "products_s": round(products_s, 3),
        "products_gflops": round(4 * n_tokens * D * V / products_s / 1e9, 1),
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "added_mb": round(added_bytes / 1e6, 1),
        **parts_s,
    }


def head(argv: Sequence[str]) -> None:
    """The head, forward and backward in one pass, compared with its two matrix products alone, with the same BLAS.

    Both are timed in one process, interleaved. The footprint is the memory that the head adds. The 4-bit matrix has the
    vocabulary's size and random weights; the bare products use one chunk of it, which stays in the cache.
    """
    parser = report.Parser("head", head.__doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    parser.add_argument("--repeats", type=report.positive, default=5)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure_head(report.model_of(options.shape, Path(scratch), 1), options.tokens, options.repeats)
    heads = ["head s", "two products s", "GFLOP/s", "ratio", "MB added", "decompress s, one core", "exp s, one core"]
    keys = ("head_s", "products_s", "products_gflops", "ratio", "added_mb", "decompress_s", "exp_s")
    print(f"{options.shape}, T = {options.tokens}")
    print(report.table(heads, [[result[key] for key in keys]]))
    print(json.dumps({"bench": "head", "shape": options.shape, "tokens": options.tokens, **result}))


# ----------------------------------------------------------------------------------------------- decompression


def decompression(argv: Sequence[str]) -> None:
    """Decompression: its share of a step; decompressing and multiplying, compared with products of packed weights.

    The share comes from a step of MeBP by phase on random weights (bench/phases.py); the head's single pass is
    separate. The products are y = x W^T with each of a shape's projections and the first rows of its head, W in 4 bits;
    both methods are interleaved in one process. On a GPU the engine uses packed products by default.
    """
    parser = report.parser("decompression", decompression.__doc__)
    parser.add_argument("--shapes", nargs="+", default=["qwen2.5-0.5b", "gemma3-1b"], choices=list(SHAPES))
    parser.add_argument(
        "--layers", type=report.positive, default=3, help="number of blocks of each shape; heads are complete"
    )
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    parser.add_argument("--batches", type=report.positive, nargs="+", default=[1, 32, 256], help="rows of x")
    parser.add_argument("--steps", type=report.positive, default=3, help="repeats, after a first one")
    report.add_models(parser)
    options = parser.parse_args(argv)
    if options.quick:
        options.shapes, options.layers, options.tokens = ["qwen2.5-0.5b"], 2, 64
        options.batches, options.steps = [1, 64], 1
    shares: list[dict[str, Any]] = []
    products: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes:
            folder = report.model_of(shape, options.models or Path(scratch), options.layers)
            how = ["--by-phase", "--tokens", options.tokens, "--steps", options.steps]
            result = report.run_module("bench.case", folder, *how)
            shares += [{"shape": shape, **share} for share in _shares(result["phases"])]
            products += [{"shape": shape, **row} for row in compare(folder, options.batches, options.steps)]
    low, high = PAPER_SHARE
    heads = ["shape", "part of a step", "ms", *SPLITS, "the paper's decompression"]
    lines = []
    for row in shares:
        paper = "-" if row["part"] == "head" else f"{low:.0%} to {high:.0%}"
        lines.append([row["shape"], row["part"], row["ms"], *(f"{row[part]:.1%}" for part in SPLITS), paper])
    print(report.table(heads, lines))
    heads = ["shape", "matrix", "rows x columns", "rows of x", "decompress ms", "packed ms", "packed / decompress"]
    medians = ("decompress_ms", "packed_ms", "ratio")
    lines = [
        [*(row[key] for key in ("shape", "matrix", "size", "rows_of_x")), *(row[key]["median"] for key in medians)]
        for row in products
    ]
    print(report.table(heads, lines))
    report.publish("decompression", options, [*shares, *products], draw_decompression)


def _shares(phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shares of read, decompress, compute and save in the blocks' forward, their backward, and the head."""
    shares = []
    for kind, part in (("f", "blocks forward"), ("b", "blocks backward"), ("h", "head")):
        rows: list[dict[str, Any]] = [row for row in phases if row["phase"].startswith(kind)]
        ms = {name: float(sum(row["split_ms"][name] for row in rows)) for name in SPLITS}
        total = sum(ms.values())
        shares.append({"part": part, "ms": round(total, 2), **{n: round(v / total, 4) for n, v in ms.items()}})
    return shares


def compare(folder: Path, batches: list[int], repeats: int) -> list[dict[str, Any]]:
    """Interleaved times of x W^T for each matrix of a block and the head's first rows, by the number of rows of x."""
    ways = [mebp_mlx.open_model(folder, "float32", weights) for weights in ("decompressed", "packed")]
    spec, rows = ways[0].spec, []
    matrices = {**spec.layers[0].linears, "head": spec.head}
    for name, linear in matrices.items():
        n_rows = min(linear.out_dims, HEAD_ROWS)
        for n in batches:
            x = mx.random.normal((n, linear.in_dims))
            mx.eval(x)
            times = [[_seconds(model, linear, n_rows, x) for model in ways] for _ in range(repeats + 1)][1:]
            rows.append(
                {
                    "matrix": name,
                    "size": f"{n_rows:,} x {linear.in_dims:,}",
                    "rows_of_x": n,
                    "decompress_ms": report.spread([1e3 * a for a, _ in times], 3),
                    "packed_ms": report.spread([1e3 * b for _, b in times], 3),
                    "ratio": report.spread([b / a for a, b in times], 3),
                }
            )
    for model in ways:
        model.weights.close()
    return rows


def _seconds(model: Model, linear: Linear, n_rows: int, x: mx.array) -> float:
    began_s = time.perf_counter()
    mx.eval(model.row_block(linear, 0, n_rows).matmul(x))
    return time.perf_counter() - began_s


def draw_decompression(plt: Any, rows: report.Rows, options: Any) -> tuple[Any, str]:
    """Left: shares of the time in each part of a step. Right: ratio of packed to decompressed time, by rows of x."""
    shares, products = [r for r in rows if "part" in r], [r for r in rows if "matrix" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    names = [f"{row['shape']}\n{row['part']}" for row in shares]
    total = [0.0] * len(shares)
    for part in sorted(SPLITS, key=lambda name: name != "decompress"):  # drawn first, so that its end shows its share
        values = [100 * row[part] for row in shares]
        left.barh(names, values, left=total, color=SPLIT_COLORS[part], label=part)
        total = [low + value for low, value in zip(total, values, strict=True)]
    left.axvspan(*(100 * share for share in PAPER_SHARE), color="0.8", alpha=0.6, label="decompression, the paper")
    left.invert_yaxis()
    left.tick_params(axis="y", labelsize=7)
    left.set_xlabel("% of the time")
    left.legend(fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    for number, shape in enumerate(options.shapes):
        own = [row for row in products if row["shape"] == shape]
        for n in options.batches:
            ratios = [row["ratio"]["median"] for row in own if row["rows_of_x"] == n]
            right.plot([n] * len(ratios), ratios, "o", color=f"C{number}", alpha=0.5, markersize=4)
        medians = [statistics.median(r["ratio"]["median"] for r in own if r["rows_of_x"] == n) for n in options.batches]
        right.plot(
            options.batches, medians, "-", color=f"C{number}", label=f"{shape}: one dot per matrix, line: median"
        )
    right.axhline(1, color="k", linewidth=0.6)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(options.batches, [str(n) for n in options.batches])
    right.set_xlabel("rows of x")
    right.set_ylabel("time, packed / decompress and multiply")
    right.legend(fontsize=7)
    return figure, "random weights"


# ----------------------------------------------------------------------------------------------- BLAS


def measure_blas(seconds: float) -> dict[str, Any]:
    """Times float32 products of BLAS_SHAPE for about `seconds`: GFLOP/s, and the footprint that the first one adds."""
    n, k, m = BLAS_SHAPE
    x, w = mx.random.normal((n, k)), mx.random.normal((k, m))
    mx.eval(x, w)
    before_bytes = footprint_bytes()
    y = x @ w
    mx.eval(y)
    added_bytes = footprint_bytes() - before_bytes - y.nbytes
    times_s: list[float] = []
    process_began_s, began_s = time.process_time(), time.perf_counter()
    while len(times_s) < 5 or time.perf_counter() - began_s < seconds:
        start_s = time.perf_counter()
        y = x @ w
        mx.eval(y)
        times_s.append(time.perf_counter() - start_s)
    wall_s = time.perf_counter() - began_s
    flops = 2 * n * k * m
    slow_first = sorted(times_s, reverse=True)
    return {
        "blas": str(load_blas()),
        "gflops": round(flops / statistics.median(times_s) / 1e9, 1),
        "gflops_p20": round(flops / slow_first[len(slow_first) // 5] / 1e9, 1),
        "gflops_best": round(flops / min(times_s) / 1e9, 1),
        "busy_cores": round((time.process_time() - process_began_s) / wall_s, 2),
        "added_mb": round(added_bytes / 1e6, 1),
    }


def blas(argv: Sequence[str]) -> None:
    """The speed of matrix products with the BLAS that mebp_mlx loads and with the one in MLX's wheel.

    Each case has its own process, because the BLAS must be chosen before `mlx.core` is imported.
    """
    parser = report.Parser("blas", blas.__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per case (default: 2)")
    options = parser.parse_args(argv)
    cases = []
    for environment in (dict(os.environ), os.environ | {"MEBP_BLAS": "off"}):
        command = [sys.executable, "-m", "bench.micro", "blas_here", str(options.seconds)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        cases.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"float32 [{BLAS_SHAPE[0]} x {BLAS_SHAPE[1]}] x [{BLAS_SHAPE[1]} x {BLAS_SHAPE[2]}]")
    heads = ["BLAS", "GFLOP/s", "p20", "best", "cores busy", "MB added"]
    print(report.table(heads, [list(case.values()) for case in cases]))
    facts = {"shape": BLAS_SHAPE, "loaded": cases[0], "wheel": cases[1], "machine": machine()}
    print(json.dumps({"bench": "blas", **facts}))


# ----------------------------------------------------------------------------------------------- opening a checkpoint


def measure_open(folder: str) -> dict[str, Any]:
    """Milliseconds and footprint of MappedWeights(folder), and milliseconds of reading a row of each tensor."""
    before_bytes, began_s = footprint_bytes(), time.perf_counter()
    weights = MappedWeights(folder)
    open_ms = (time.perf_counter() - began_s) * 1e3
    open_bytes = footprint_bytes() - before_bytes
    began_s = time.perf_counter()
    for name in weights.names:
        weights.view(name)[0].sum()
    touch_ms = (time.perf_counter() - began_s) * 1e3
    return {"open_ms": open_ms, "open_bytes": open_bytes, "touch_ms": touch_ms, "n_tensors": len(weights)}


def open_cost(argv: Sequence[str]) -> None:
    """Time and footprint of opening a checkpoint of Gemma-3-4B's size, whose files are sparse except for their headers.

    Each repetition has its own process, so no file has been mapped before.
    """
    parser = report.Parser("open_cost", open_cost.__doc__)
    parser.add_argument("--shape", default="gemma3-4b", choices=list(SHAPES))
    parser.add_argument("--repeats", type=report.positive, default=5)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = report.model_of(options.shape, Path(scratch), sparse=True)
        n_files = len(list(folder.glob("*.safetensors")))
        runs = [report.run_module("bench.micro", "open_here", folder) for _ in range(options.repeats)]
    result: dict[str, Any] = {"shape": options.shape, "n_tensors": runs[0]["n_tensors"], "n_files": n_files}
    for name, key, unit in (("open_ms", "open_ms", 1), ("open_mb", "open_bytes", 1e6)):
        values = [run[key] / unit for run in runs]
        result |= {name: round(statistics.median(values), 2), f"{name}_worst": round(max(values), 2)}
    print(f"{options.shape}: {result['n_tensors']} tensors in {n_files} files, {options.repeats} processes")
    lines = [
        ["open, ms", result["open_ms"], result["open_ms_worst"], 50],
        ["footprint, MB", result["open_mb"], result["open_mb_worst"], 5],
    ]
    print(report.table(["", "median", "worst", "required below"], lines))
    print(json.dumps({"bench": "open_cost", **result, "machine": machine()}))


PICTURES = {"decompression": draw_decompression}
BENCHES: dict[str, report.Bench] = {
    "head": head,
    "decompression": decompression,
    "blas": blas,
    "open_cost": open_cost,
    # Run by `blas` and `open_cost` in child processes.
    "blas_here": lambda argv: print(json.dumps(measure_blas(float(argv[0])))),
    "open_here": lambda argv: print(json.dumps(measure_open(argv[0]))),
}


def main(argv: Sequence[str] | None = None) -> object:
    return report.pick(BENCHES, argv)


if __name__ == "__main__":
    report.run(main)
