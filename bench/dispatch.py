"""What a GPU would see of one optimizer step, counted on any machine: `python -m bench.dispatch SHAPE`.

The step is the real one (engine, updater), on a model of random weights, as Metal runs it by default: 16 bits, packed
products, mapped pages adopted, grain "block". By stage of the step: blocking evaluations, submissions, graph nodes,
packed products, bytes copied to MLX, bytes of the file; and the graph of mlx-lm's own step beside it, never evaluated.

A node is a primitive of the graph that is handed to an evaluation; "non-view" leaves out those that only look at memory
in another way (reshape, slice, transpose ...). On the CPU the fast primitives (rms_norm, rope, attention) are several
nodes each, ours and mlx-lm's alike, where a GPU has one. Without a GPU a packed product and the head's kernel are one
node each, of the right shapes and next to no cost, and adopted tensors are constants; with one, products are real, and
where pages cannot be adopted (CUDA) tensors are copied once, before the step.

Steps of N - 1 and N blocks (--layers N) are counted, and their difference is added for every further block: exact,
since the blocks of a shape have the same graph, unless rows are longer than a sliding window (refused).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import mebp_mlx  # noqa: F401  isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx

from bench import report
from bench.dispatch_case import MLX_LM, OPTIMIZERS, Case, count, extrapolated, mlx_lm, peak_bytes, total
from mebp_mlx.errors import UserError
from mebp_mlx.options import _size as options_size
from mebp_mlx.system.device import on_gpu, on_metal
from mebp_mlx.testing.synth import SHAPES, model_config, write_model

_GROWS = ("stages", "names", "kept_bytes", "adopted_tensors", "adopted_bytes")  # with the number of blocks


def counted(options: argparse.Namespace) -> dict[str, Any]:
    """`count` of the shape's whole depth, from `options.layers` blocks where that is less; "peak_bytes", "plan"."""

    def of(n_blocks: int, with_peak: bool) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_model(options.shape, Path(scratch) / "model", layers=n_blocks, sparse=True)
            case = Case(folder, options.tokens, options.optimizer, options.kept_bytes, options.memory_budget)
            windows = [layer.window for layer in case.model.spec.layers if layer.window]
            if n_blocks < options.depth and windows and min(windows) < options.tokens:
                window = f"longer than a window of {min(windows)}, so blocks differ"
                raise UserError(f"--tokens {options.tokens}: {window}: --layers {options.depth} counts them all")
            more = {"peak_bytes": peak_bytes(case), "plan": case.plan.to_dict()} if with_peak else {}
            return {**count(case), **more}

    found = of(options.layers, True)
    if options.layers < options.depth:
        fewer = of(options.layers - 1, False)
        for name in _GROWS:
            found[name] = extrapolated(fewer[name], found[name], options.depth - options.layers)
    return found


def limits(
    options: argparse.Namespace, found: dict[str, Any], theirs: dict[str, Any]
) -> list[tuple[str, float, float]]:
    """(what, number, the most that it may be) of a step; products and nodes: where a row is one tile."""
    all_of, depth, head = total(found["stages"]), options.depth, found["stages"]["head"]["products"]
    rows: list[tuple[str, float, float]] = [
        ("blocking evaluations: 2 a block + 16", all_of["waits"], 2 * depth + 16),
        ("weight bytes copied to MLX", all_of["copied_weights"], 0),
        ("bytes written to the file", all_of["written"], 0),
    ]
    if options.tokens <= found["plan"]["token_block"]:
        most = round(1.15 * theirs["plain"]["non_view"])
        rows.append(("packed products: 14 a block + 4 + the head's", all_of["products"], 14 * depth + 4 + head))
        rows.append(("non-view nodes: 1.15 of mlx-lm's", all_of["non_view"], most))
    if (options.shape, options.tokens) == ("qwen2.5-0.5b", 256):
        peak_mb = max(found["peak_bytes"].values()) / 1e6
        rows.append(("MLX's peak over LoRA and state, kept values in the file, MB", peak_mb, 60))
    return rows


def device() -> str:
    """What products ran on."""
    if not on_gpu():
        return "no GPU: packed products and the head's kernel are stand-ins of one node, adoption is emulated"
    name = mx.device_info().get("device_name", "a GPU")
    return f"{name}: real products" + ("" if on_metal() else "; adoption emulated, the head's kernel is its reference")


def _line(name: str, row: dict[str, Any]) -> list[Any]:
    copied = sum(row[key] for key in ("copied_weights", "copied_gathered", "copied_file", "copied_other"))
    sizes = [n / 1e6 if n else None for n in (copied, row["copied_weights"], row["written"], row["read"])]
    numbers = [row[key] or None for key in ("waits", "submissions", "products", "nodes", "non_view", "copies")]
    return [name, *numbers, *sizes]


def show(options: argparse.Namespace, found: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The table, what goes beside it, and the limits."""
    heads = ["", "waits", "submissions", "packed products", "nodes", "non-view", "copies", "MB"]
    heads += ["of weights, MB", "written, MB", "read, MB"]
    rows = [_line(stage, row) for stage, row in found["stages"].items() if any(row.values())]
    rows.append(_line("total", total(found["stages"])))
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
    mb = {name: round(n_bytes / 1e6, 1) for name, n_bytes in found["peak_bytes"].items()}
    print(f"adopted once   {found['adopted_tensors']:,} tensors, {found['adopted_bytes'] / 1e6:,.1f} MB")
    print(f"kept values    {found['kept_bytes'] / 1e6:,.1f} MB")
    print(f"MLX's peak     over LoRA and state, kept values in the file, MB: {mb}")
    if found["step_s"] is not None:
        print(f"a step         {found['step_s']:.4f} s, {options.layers} blocks")
    judged = [(*row, "ok" if row[1] <= row[2] else "over") for row in limits(options, found, theirs)]
    print(report.table(["", "found", "at most", ""], judged))


GROUPS = ("forward", "head", "backward", "update")


def _by_group(stages: dict[str, dict[str, int]], key: str) -> list[int]:
    """A number of the stages by the picture's colours; what embeds counts as forward, the rest as update."""
    found = dict.fromkeys(GROUPS, 0)
    for stage, row in stages.items():
        group = {"embed": "forward", "rest": "update"}.get(stage, stage.partition(":")[0])
        found[group] += row.get(key, 0)
    return list(found.values())


def draw(plt: Any, options: argparse.Namespace, found: dict[str, Any], theirs: dict[str, Any], about: Any) -> None:
    """Non-view nodes and products beside mlx-lm's; waits and submissions by stage."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    steps = {"ours": found["stages"], **{f"mlx-lm,\n{name}": row["phases"] for name, row in theirs.items()}}
    ours = {"submissions": found["stages"], "waits": found["stages"]}
    panels = [("non-view graph nodes", steps, ["non_view"] * 3), ("packed products", steps, ["products"] * 3)]
    panels.append(("submissions, blocking evaluations", ours, list(ours)))
    for panel, (title, bars, keys) in zip(axes, panels, strict=True):
        longest = 0
        for place, (stages, key) in enumerate(zip(bars.values(), keys, strict=True)):
            left = 0
            for colour, n in enumerate(_by_group(stages, key)):
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
    report.save_picture(plt, figure, options.out / "dispatch.png", about, device().partition(",")[0])


def _size(text: str) -> int:
    try:
        return options_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> None:
    parser = report.parser("dispatch", __doc__)
    parser.add_argument("shape", metavar="SHAPE", nargs="?", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--layers", type=report.positive, default=3, help="blocks that are run (default: 3)")
    parser.add_argument("--tokens", type=report.positive, default=256)
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="sgd")
    parser.add_argument("--kept-bytes", type=_size, help="of kept values in memory, the rest in a file (default: all)")
    parser.add_argument("--memory-budget", type=_size, help="the plan that training would choose; all blocks are run")
    options = parser.parse_args()
    if options.quick:
        options.tokens = min(options.tokens, 64)
    config = model_config(options.shape)
    options.depth = config.get("text_config", config)["num_hidden_layers"]
    whole = options.memory_budget is not None or options.kept_bytes is not None  # what is kept depends on the depth
    options.layers = options.depth if whole else min(max(2, options.layers), options.depth)
    try:
        found = counted(options)
        theirs = {name: mlx_lm(config, options.tokens, options.optimizer, how) for name, how in MLX_LM.items()}
    except UserError as error:
        report.refuse(error)
    show(options, found, theirs)
    about = report.context(options)
    plt = report.pyplot() if options.out else None
    if plt is not None:
        draw(plt, options, found, theirs, about)
    rows = [{"stage": stage, **row} for stage, row in found.pop("stages").items()]
    more = {"device": device(), "extrapolated": options.layers < options.depth, "mlx_lm": theirs}
    report.write("dispatch", options, rows, **more, **found)


if __name__ == "__main__":
    main()
