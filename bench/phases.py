"""The paper's Figure 2: memory and time of a training step, phase by phase: `python -m bench.phases`.

Phases: `emb`, `f0` to `fN`, `head`, `bN` to `b0`; the passes of a zeroth-order step are added up. Each case runs in its
own process (`bench.case --by-phase`) with three kinds of steps:

- timed: each phase as a whole;
- memory: the footprint's peak within a phase, the footprint at its end, and the peak of MLX's arrays are recorded. The
  C heap is trimmed after each phase; otherwise glibc would keep freed memory and the footprint would never fall;
- split: every read, decompression and kept value is evaluated and timed separately. The sum is slightly higher.

read: weights copied out of the mapped files. decompress: quantized weights to the compute dtype; affine weights on a
CPU are read from the map in this stage, so it includes waiting for their pages. save: storing and fetching kept values,
in memory or in the file. compute: everything else and the update, which belongs to a block's backward or, for
zeroth-order engines, to `head`.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mebp_mlx  # noqa: F401  # isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx

from bench import report
from bench.case import Stepper, add_memory_budget, plan_line
from bench.instruments import Clock, Phases, Wraps
from mebp_mlx.engine.base import Store
from mebp_mlx.model.base import Model, Tensor
from mebp_mlx.system.footprint import PeakMeter, footprint_bytes
from mebp_mlx.testing.synth import SHAPES

CASES: dict[str, tuple[str, dict[str, str]]] = {  # label, flags of bench.case
    "mebp": ("MeBP, products saved", {}),
    "mebp-inputs": ("MeBP, block inputs saved (the paper's policy)", {"saved": "inputs"}),
    "mezo": ("MeZO, both passes", {"engine": "mezo"}),
}
SPLITS = ("read", "decompress", "compute", "save")
COLORS = {"mebp": "C1", "mebp-inputs": "C2", "mezo": "C0"}
SPLIT_COLORS = {"read": "#7f7f7f", "decompress": "#d62728", "compute": "#4c78a8", "save": "#f2b701"}
PAGE = Path(__file__).with_name("phases.html")


def measure(folder: Path, n_tokens: int, n_steps: int, **options: Any) -> dict[str, Any]:
    """{"phases": rows in order, "step_ms", "split_step_ms", "peak_mb", ...} of `n_steps` steps of each kind.

    Times in ms, sizes in MB. options: arguments of Stepper.
    """
    before_bytes = footprint_bytes()
    with PeakMeter() as meter:
        stepper = Stepper(folder, n_tokens, **{"optimizer": "sgd", **options})
        stepper.step(0)  # allocates the pages of the file of kept values
        step_s, times = [], _Times()
        for number in range(n_steps):
            times.seconds.append({})
            step_s.append(_in_phases(stepper, 1 + number, times.around))
        clocks = [_split(stepper, 1 + n_steps + number) for number in range(n_steps)]
        peak_bytes = meter.peak_bytes
        memory = _Memory(meter)
        _in_phases(stepper, 1 + 2 * n_steps, memory.around)
        stepper.close()
    rows = []
    for phase in times.seconds[0]:
        split = {part: [1e3 * clock.seconds.get(f"{phase}|{part}", 0.0) for clock in clocks] for part in SPLITS}
        rows.append(
            {
                "phase": phase,
                "ms": report.spread([1e3 * seconds[phase] for seconds in times.seconds], 3),
                "split_ms": {part: report.spread(values, 3)["median"] for part, values in split.items()},
                "peak_mb": round(meter.phases[phase] / 1e6, 2),
                "end_mb": round(memory.end_bytes[phase] / 1e6, 2),
                "arrays_mb": round(memory.arrays_bytes[phase] / 1e6, 2),
            }
        )
    return {
        "phases": rows,
        "step_ms": report.spread([1e3 * seconds for seconds in step_s], 3),
        "split_step_ms": report.spread([1e3 * sum(clock.seconds.values()) for clock in clocks], 3),
        "peak_mb": round(peak_bytes / 1e6, 1),
        "before_mb": round(before_bytes / 1e6, 1),
        "lora_mb": round(4e-6 * stepper.n_parameters, 1),
        "plan": stepper.plan_record,
    }


def _in_phases(stepper: Stepper, number: int, around: Callable[[str, Callable[[], Any]], Any]) -> float:
    """Runs a step, each phase through `around`; returns its seconds."""
    phases = Phases(around)
    try:
        return stepper.timed_step(number)
    finally:
        phases.remove()


class _Times:
    """The seconds of each phase, per step."""

    def __init__(self) -> None:
        self.seconds: list[dict[str, float]] = []

    def around(self, phase: str, run: Callable[[], Any]) -> Any:
        began_s, known = time.perf_counter(), self.seconds[-1]
        value = run()
        mx.eval(value)
        known[phase] = known.get(phase, 0.0) + time.perf_counter() - began_s
        return value


class _Memory:
    """The peak of MLX's arrays in each phase, and the footprint at its end (the meter has the footprint's peak)."""

    def __init__(self, meter: PeakMeter):
        self.meter = meter
        self.arrays_bytes: dict[str, int] = {}
        self.end_bytes: dict[str, int] = {}

    def around(self, phase: str, run: Callable[[], Any]) -> Any:
        trim_heap()
        with self.meter.phase(phase):
            mx.reset_peak_memory()
            value = run()
            mx.eval(value)
        trim_heap()
        self.arrays_bytes[phase] = max(self.arrays_bytes.get(phase, 0), mx.get_peak_memory())
        self.end_bytes[phase] = max(self.end_bytes.get(phase, 0), self.meter.mark())
        return value


def trim_heap() -> None:
    """Returns freed pages of the C heap to the system (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _split(stepper: Stepper, number: int) -> Clock:
    """Runs one step; returns its seconds by "phase|part"."""
    clock, inside = Clock(), Wraps()
    phases = Phases(lambda phase, run: clock.timed(f"{phase}|compute", run))
    for owner, names, part in (
        (Tensor, ("__getitem__",), "read"),
        (Model, ("_dense",), "decompress"),
        (Store, ("put", "get", "take", "write_behind"), "save"),
    ):
        for name in names:
            inside.wrap(clock, owner, name, lambda *_, part=part: f"{phases.now}|{part}")
    try:
        clock.timed("rest", lambda: stepper.step(number))
    finally:
        inside.remove()
        phases.remove()
    return clock


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser("per_layer", __doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--layers", type=report.positive, help="number of blocks (default: all)")
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    parser.add_argument("--steps", type=report.positive, default=3, help="steps of each kind, after a first one")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    report.add_models(parser)
    add_memory_budget(parser, None, "the trainer's")
    options = parser.parse_args(argv)
    if options.quick:
        options.layers, options.tokens, options.steps = 2, 64, 1
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = report.model_of(options.shape, options.models or Path(scratch), options.layers)
        how = ["--by-phase", "--tokens", options.tokens, "--steps", options.steps]
        how += [] if options.memory_budget is None else ["--memory-budget", options.memory_budget]
        for case in options.cases:
            flags = [word for name, value in CASES[case][1].items() for word in (f"--{name}", value)]
            results[case] = result = report.run_module("bench.case", folder, *flags, *how)
            print(f"{case}: {result['peak_mb']} MB, {result['step_ms']['median']:,.0f} ms per step", flush=True)
            print(f"  plan     {plan_line(result['plan'])}", flush=True)
    print(report.table(HEADS, [line for case, result in results.items() for line in _lines(case, result)]))
    rows = [{"case": case, **row} for case, result in results.items() for row in result["phases"]]
    totals = {case: {k: v for k, v in result.items() if k != "phases"} for case, result in results.items()}
    report.publish("per_layer", options, rows, draw, totals=totals)
    if options.out is not None:
        _write_page(rows, options)


def _write_page(rows: report.Rows, options: Any) -> None:
    """per_layer.html: the picture as a page that works offline and shows a phase's parts under the pointer."""
    _, about = report.read(options.out, "per_layer")
    labels = {case: label for case, (label, _) in CASES.items()}
    data = {"title": _title(options), "machine": report.machine_label(about), "labels": labels, "rows": rows}
    text = json.dumps(data | {"splits": SPLIT_COLORS}).replace("</", "<\\/")
    page = PAGE.read_text(encoding="utf-8").replace("/*DATA*/", text)
    (options.out / "per_layer.html").write_text(page, encoding="utf-8")


def _title(options: Any) -> str:
    what = f"{options.shape}, {options.layers} blocks" if options.layers else options.shape
    return f"{what}: T = {options.tokens}, batch 1, rank 8, SGD"


HEADS = ["case", "phases", "number", "ms", "share of step", "peak MB", "arrays MB", *SPLITS]


def _lines(case: str, result: dict[str, Any]) -> list[list[Any]]:
    """A row for each kind of phase: the total time of its phases, and the share of each part."""
    lines = []
    for kind, what in (("e", "embedding"), ("f", "blocks forward"), ("h", "head"), ("b", "blocks backward")):
        rows: list[dict[str, Any]] = [row for row in result["phases"] if row["phase"].startswith(kind)]
        if not rows:
            continue
        ms: float = sum(row["ms"]["median"] for row in rows)
        split = [float(sum(row["split_ms"][part] for row in rows)) for part in SPLITS]
        peak, arrays = (max(row[key] for row in rows) for key in ("peak_mb", "arrays_mb"))
        shares = [f"{part / sum(split):.0%}" for part in split]
        share = f"{ms / result['step_ms']['median']:.0%}"
        lines.append([CASES[case][0], what, len(rows), round(ms), share, peak, arrays, *shares])
    return lines


def draw(plt: Any, rows: report.Rows, options: Any) -> tuple[Any, str]:
    """Memory above, time by part below; the x axis is the longest list of phases."""
    cases = {case: [row for row in rows if row["case"] == case] for case in CASES}
    cases = {case: own for case, own in cases.items() if own}
    order = max(([row["phase"] for row in own] for own in cases.values()), key=len)
    figure, (memory, time) = plt.subplots(2, 1, figsize=(max(10, min(13, 0.22 * len(order) + 3)), 6.4), sharex=True)
    _draw_memory(memory, cases, order)
    _draw_time(time, cases, order)
    every = len(order) // 30 + 1
    shown = [phase for n, phase in enumerate(order) if phase in ("emb", "head") or n % every == 1 % every]
    time.set_xticks([order.index(phase) for phase in shown], shown, fontsize=7)
    time.set_xlabel("phase: embedding, blocks forward, head, blocks backward")
    for axes in (memory, time):
        axes.grid(axis="x", visible=False)
    time.set_xlim(-0.8, len(order) - 0.2)
    figure.suptitle(_title(options))
    return figure, "random weights"


def _draw_memory(axes: Any, cases: dict[str, list[Any]], order: list[str]) -> None:
    """Lines: peaks of the footprint; dotted lines: peaks of MLX's arrays."""
    for case, own in cases.items():
        x = [order.index(row["phase"]) for row in own]
        axes.plot(x, [row["peak_mb"] for row in own], ".-", markersize=3, color=COLORS[case], label=CASES[case][0])
        axes.plot(x, [row["arrays_mb"] for row in own], ":", color=COLORS[case])
    axes.plot([], [], ":", color="k", label="dotted: MLX's arrays")
    axes.set_ylabel("peak within the phase, MB")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)


def _draw_time(axes: Any, cases: dict[str, list[Any]], order: list[str]) -> None:
    """One bar per case, split by part; the head's bars are cut off and labelled with their sums."""
    from matplotlib.patches import Patch

    width, tallest = 0.84 / len(cases), 0.0
    for number, (case, own) in enumerate(cases.items()):
        x = [order.index(row["phase"]) + width * (number - (len(cases) - 1) / 2) for row in own]
        total = [0.0] * len(own)
        for part in SPLITS:
            values = [row["split_ms"][part] for row in own]
            color, edge = SPLIT_COLORS[part], COLORS[case]
            axes.bar(x, values, width, bottom=total, color=color, edgecolor=edge, linewidth=0.4)
            total = [low + value for low, value in zip(total, values, strict=True)]
        by_phase = {row["phase"]: ms for row, ms in zip(own, total, strict=True)}
        head = f"{by_phase.pop('head'):,.0f} ms"
        tallest = max([tallest, *by_phase.values()])
        offset = (9 + 0.3 * 72 * width * len(cases), -11 - 10 * number)
        place = {"xycoords": ("data", "axes fraction"), "xytext": offset, "textcoords": "offset points"}
        axes.annotate(head, (order.index("head"), 1), color=COLORS[case], fontsize=7, **place)
    axes.set_ylabel("milliseconds")
    axes.set_ylim(0, 1.7 * tallest)
    handles = [Patch(facecolor=SPLIT_COLORS[part], label=part) for part in SPLITS]
    handles += [Patch(facecolor="none", edgecolor=COLORS[case], label=case) for case in cases]
    axes.legend(handles=handles, fontsize=7, ncols=len(handles), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


PICTURES = {"per_layer": draw}

if __name__ == "__main__":
    report.run(main)
