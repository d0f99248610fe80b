"""What a GPU would see of one optimizer step, counted on any machine: `python -m bench.dispatch SHAPE`.

The step is the real one (engine and updater) on random weights, as Metal runs it by default: 16 bits, packed products,
adopted pages, grain "block". For each stage it counts blocking evaluations, submissions, graph nodes, packed products,
bytes copied to MLX and bytes of the file. The graph of mlx-lm's own step is counted too, and never evaluated.

A node is a primitive of the graph that an evaluation gets; "non-view" nodes exclude those that only view memory in
another way (reshape, slice, transpose ...). On the CPU the fast primitives (rms_norm, rope, attention) are several
nodes each, for mlx-lm too, where a GPU has one. Without a GPU, packed products and the head's kernel are stand-ins of
one node with the right shapes, and adopted tensors are constants; from 4,097 tokens on a block of queries' attention
is a stand-in, too. With a GPU, products are real; where pages cannot be adopted (CUDA), tensors are copied once, before
the step.

Steps of N - 1 and N blocks (--layers N) are counted, and their difference is added for every further block. That is
exact, because the blocks of a shape have the same graph, unless rows are longer than a sliding window (refused).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mebp_mlx  # noqa: F401  isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx

from bench import report
from bench.dispatch.step import MLX_LM, OPTIMIZERS, Case, count, extrapolated, mlx_lm, peak_bytes, total
from mebp_mlx.errors import UserError
from mebp_mlx.options import _size as options_size
from mebp_mlx.system.device import on_gpu, on_metal
from mebp_mlx.testing.synth import SHAPES, model_config, write_model

_GROWS = ("stages", "names", "kept_bytes", "adopted_tensors", "adopted_bytes")  # with the number of blocks


def counted(options: argparse.Namespace) -> dict[str, Any]:
    """`count` for the shape's depth, extrapolated from `options.layers` blocks if fewer; with "peak_bytes", "plan"."""

    def of(n_blocks: int, with_peak: bool) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_model(model_config(options.shape, n_blocks), Path(scratch) / "model", sparse=True)
            case = Case(folder, options.tokens, options.optimizer, options.kept_bytes, options.memory_budget)
            windows = [layer.window for layer in case.model.spec.layers if layer.window]
            if n_blocks < options.depth and windows and min(windows) < options.tokens:
                window = f"longer than a window of {min(windows)}, so blocks differ"
                raise UserError(f"--tokens {options.tokens}: {window}: --layers {options.depth} counts them all")
            more = {"peak_bytes": peak_bytes(case), "plan": case.plan.to_dict()} if with_peak else {}
            return {**count(case), **more}

    result = of(options.layers, True)
    if options.layers < options.depth:
        fewer = of(options.layers - 1, False)
        for name in _GROWS:
            result[name] = extrapolated(fewer[name], result[name], options.depth - options.layers)
    return result


def limits(
    options: argparse.Namespace, result: dict[str, Any], theirs: dict[str, Any]
) -> list[tuple[str, float, float]]:
    """(what, number, limit) of a step; products and nodes have limits only where a row is one tile."""
    all_of, depth, head = total(result["stages"]), options.depth, result["stages"]["head"]["products"]
    rows: list[tuple[str, float, float]] = [
        ("blocking evaluations: 2 per block + 16", all_of["waits"], 2 * depth + 16),
        ("weight bytes copied to MLX", all_of["copied_weights"], 0),
        ("bytes written to the file", all_of["written"], 0),
    ]
    if options.tokens <= result["plan"]["token_block"]:
        most = round(1.15 * theirs["plain"]["non_view"])
        rows.append(("packed products: 14 per block + 4 + the head's", all_of["products"], 14 * depth + 4 + head))
        rows.append(("non-view nodes: 1.15 of mlx-lm's", all_of["non_view"], most))
    if (options.shape, options.tokens) == ("qwen2.5-0.5b", 256):
        peak_mb = max(result["peak_bytes"].values()) / 1e6
        rows.append(("MLX's peak over LoRA and state, kept values in the file, MB", peak_mb, 60))
    return rows


def device() -> str:
    """What the products ran on."""
    if not on_gpu():
        return "no GPU: packed products and the head's kernel are stand-ins of one node, adoption is emulated"
    name = mx.device_info().get("device_name", "a GPU")
    return f"{name}: real products" + ("" if on_metal() else "; adoption emulated, the head's kernel is its reference")


def _line(name: str, row: dict[str, Any]) -> list[Any]:
    copied = sum(row[key] for key in ("copied_weights", "copied_gathered", "copied_file", "copied_other"))
    sizes = [n / 1e6 if n else None for n in (copied, row["copied_weights"], row["written"], row["read"])]
    numbers = [row[key] or None for key in ("waits", "submissions", "products", "nodes", "non_view", "copies")]
    return [name, *numbers, *sizes]


def show(options: argparse.Namespace, result: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Prints the table, further counts, and the limits."""
    heads = ["", "waits", "submissions", "packed products", "nodes", "non-view", "copies", "MB"]
    heads += ["of weights, MB", "written, MB", "read, MB"]
    rows = [_line(stage, row) for stage, row in result["stages"].items() if any(row.values())]
    rows.append(_line("total", total(result["stages"])))
    for name, row in theirs.items():
        numbers = [row[key] for key in ("products", "nodes", "non_view")]
        rows.append([f"mlx-lm, {name} (graph only)", row["waits"], None, *numbers, *[None] * 5])
    depth = options.depth
    extent = "counted whole"
    if options.layers < depth:
        extent = f"{options.layers - 1} and {options.layers} blocks counted, the rest extrapolated"
    print(f"{options.shape}, {depth} blocks ({extent}), T = {options.tokens}, {options.optimizer}")
    print(device() + ("" if on_gpu() else "; rms_norm, rope and attention are several nodes each, mlx-lm's too"))
    print(report.table(heads, rows))
    mb = {name: round(n_bytes / 1e6, 1) for name, n_bytes in result["peak_bytes"].items()}
    print(f"adopted once   {result['adopted_tensors']:,} tensors, {result['adopted_bytes'] / 1e6:,.1f} MB")
    print(f"kept values    {result['kept_bytes'] / 1e6:,.1f} MB")
    print(f"MLX's peak     over LoRA and state, kept values in the file, MB: {mb}")
    if result["step_s"] is not None:
        print(f"step           {result['step_s']:.4f} s, {options.layers} blocks")
    judged = [(*row, "ok" if row[1] <= row[2] else "over") for row in limits(options, result, theirs)]
    print(report.table(["", "counted", "limit", ""], judged))


GROUPS = ("forward", "head", "backward", "update")


def _by_group(stages: Mapping[str, Mapping[str, Any]], key: str) -> list[int]:
    """A number by the picture's colours; embedding counts as forward, the rest as update."""
    counts = dict.fromkeys(GROUPS, 0)
    for stage, row in stages.items():
        group = {"embed": "forward", "rest": "update"}.get(stage, stage.partition(":")[0])
        counts[group] += row.get(key, 0)
    return list(counts.values())


def draw(plt: Any, rows: report.Rows, options: Any) -> tuple[Any, str]:
    """Non-view nodes and products beside mlx-lm's; waits and submissions by stage."""
    stages: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        stages.setdefault(row["side"], {})[row["stage"]] = row
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    steps = {side.replace(", ", ",\n"): by_stage for side, by_stage in stages.items()}
    ours = {"submissions": stages["ours"], "waits": stages["ours"]}
    panels = [("non-view graph nodes", steps, ["non_view"] * 3), ("packed products", steps, ["products"] * 3)]
    panels.append(("submissions, blocking evaluations", ours, list(ours)))
    for panel, (title, bars, keys) in zip(axes, panels, strict=True):
        longest = 0
        for place, (by_stage, key) in enumerate(zip(bars.values(), keys, strict=True)):
            left = 0
            for colour, n in enumerate(_by_group(by_stage, key)):
                panel.barh([place], [n], left=left, color=f"C{colour}", label=None if place else GROUPS[colour])
                left += n
            panel.text(left, place, f" {left:,}", va="center", fontsize=8)
            longest = max(longest, left)
        panel.set_yticks(range(len(bars)), bars)
        panel.set_title(title)
        panel.set_xlim(0, 1.3 * longest)
        panel.invert_yaxis()
        panel.grid(axis="y", visible=False)
    axes[2].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    what = f"{options.shape}, {options.depth} blocks, T = {options.tokens}, {options.optimizer}"
    figure.suptitle(f"One step of {what} (mlx-lm's head is in its phases)")
    return figure, options.products


def _size(text: str) -> int:
    try:
        return options_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser("dispatch", __doc__)
    parser.add_argument("shape", metavar="SHAPE", nargs="?", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--layers", type=report.positive, default=3, help="blocks to run (default: 3)")
    parser.add_argument("--tokens", type=report.positive, default=256)
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="sgd")
    parser.add_argument("--kept-bytes", type=_size, help="kept values in memory, the others in a file (default: all)")
    parser.add_argument("--memory-budget", type=_size, help="use the plan that training would choose; runs all blocks")
    options = parser.parse_args(argv)
    if options.quick:
        options.tokens = min(options.tokens, 64)
    config = model_config(options.shape)
    options.depth = config.get("text_config", config)["num_hidden_layers"]
    whole = options.memory_budget is not None or options.kept_bytes is not None  # what is kept depends on the depth
    options.layers = options.depth if whole else min(max(2, options.layers), options.depth)
    result = counted(options)
    theirs = {name: mlx_lm(config, options.tokens, options.optimizer, how) for name, how in MLX_LM.items()}
    show(options, result, theirs)
    rows = [{"side": "ours", "stage": stage, **row} for stage, row in result.pop("stages").items()]
    for name, step in theirs.items():
        rows += [{"side": f"mlx-lm, {name}", "stage": phase, **row} for phase, row in step["phases"].items()]
    facts = {name: value for name, value in result.items() if name != "names"}
    options.products = device().partition(",")[0]
    report.publish("dispatch", options, rows, draw, extrapolated=options.layers < options.depth, **facts)


PICTURES = {"dispatch": draw}

if __name__ == "__main__":
    report.run(main)
