"""Decompression: its share of a step's forward and backward, and decompress-then-multiply against packed products.

The share: a step of MeBP phase by phase on random weights (bench/layers.py), the head's one pass apart; the paper has
32 to 42 % on an iPhone. The products: y = x W^T with each of a shape's projections and its head's first rows, W packed
in 4 bits, float32, both ways by turns in one process; "decompress" is what the engine does on this machine. On Metal
packed products are the engine's default, and this bench times them there as it stands.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mebp_mlx  # isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx

from bench import report
from bench.layers import SPLITS
from mebp_mlx.model.base import Model
from mebp_mlx.model.config import Linear
from mebp_mlx.testing.synth import SHAPES

PAPER_SHARE = (0.32, 0.42)
HEAD_ROWS = 8192


def main() -> None:
    parser = report.parser("decompression", __doc__)
    parser.add_argument("--shapes", nargs="+", default=["qwen2.5-0.5b", "gemma3-1b"], choices=list(SHAPES))
    parser.add_argument("--layers", type=report.positive, default=3, help="blocks of each; heads are whole")
    parser.add_argument("--tokens", type=report.positive, default=256)
    parser.add_argument("--batches", type=report.positive, nargs="+", default=[1, 32, 256], help="rows of x")
    parser.add_argument("--steps", type=report.positive, default=3, help="repeats, after a first one")
    parser.add_argument("--models", type=Path, help="keep the random models in this folder (default: a temporary one)")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.layers, options.tokens = ["qwen2.5-0.5b"], 2, 64
        options.batches, options.steps = [1, 64], 1
    shares: list[dict[str, Any]] = []
    products: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes:
            folder = report.model_of(shape, options.models or Path(scratch), options.layers)
            found = report.run_module("bench.layers", folder, "--tokens", options.tokens, "--steps", options.steps)
            shares += [{"shape": shape, **share} for share in _shares(found["phases"])]
            products += [{"shape": shape, **row} for row in compare(folder, options.batches, options.steps)]
    low, high = PAPER_SHARE
    heads = ["shape", "part of a step", "ms", *SPLITS, "the paper's decompression"]
    lines = [
        [
            row["shape"],
            row["part"],
            row["ms"],
            *(f"{row[part]:.1%}" for part in SPLITS),
            "-" if row["part"] == "head" else f"{low:.0%} to {high:.0%}",
        ]
        for row in shares
    ]
    print(report.table(heads, lines))
    heads = ["shape", "matrix", "rows x columns", "rows of x", "decompress ms", "packed ms", "packed / decompress"]
    medians = ("decompress_ms", "packed_ms", "ratio")
    lines = [
        [*(row[key] for key in ("shape", "matrix", "size", "rows_of_x")), *(row[key]["median"] for key in medians)]
        for row in products
    ]
    print(report.table(heads, lines))
    about = report.context(options)
    plt = report.pyplot() if options.out else None
    if plt is not None:
        _draw(plt, shares, products, options, about)
    report.write("decompression", options, [*shares, *products], paper={"share": PAPER_SHARE})


def _shares(phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shares of read, decompress, compute and save in the blocks' forward, their backward, and the head."""
    found = []
    for kind, part in (("f", "blocks forward"), ("b", "blocks backward"), ("h", "head")):
        rows: list[dict[str, Any]] = [row for row in phases if row["phase"].startswith(kind)]
        ms = {name: float(sum(row["split_ms"][name] for row in rows)) for name in SPLITS}
        total = sum(ms.values())
        found.append({"part": part, "ms": round(total, 2), **{n: round(v / total, 4) for n, v in ms.items()}})
    return found


def compare(folder: Path, batches: list[int], repeats: int) -> list[dict[str, Any]]:
    """Each matrix of a block, and the head's first rows, times x of each number of rows, both ways by turns."""
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


def _draw(plt: Any, shares: list[Any], products: list[Any], options: Any, about: dict[str, Any]) -> None:
    """Left: what each part of a step spends its time on. Right: packed over decompressed, by rows of x."""
    from bench.per_layer import SPLIT_COLORS

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    names = [f"{row['shape']}\n{row['part']}" for row in shares]
    total = [0.0] * len(shares)
    for part in sorted(SPLITS, key=lambda name: name != "decompress"):  # first: its end is its share
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
        right.plot(options.batches, medians, "-", color=f"C{number}", label=f"{shape}: a dot a matrix, median")
    right.axhline(1, color="k", linewidth=0.6)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(options.batches, [str(n) for n in options.batches])
    right.set_xlabel("rows of x")
    right.set_ylabel("time, packed / decompress and multiply")
    right.legend(fontsize=7)
    report.save_picture(plt, figure, options.out / "decompression.png", about, "random weights")


if __name__ == "__main__":
    main()
