"""The time of a step or the head on a chip, counted and not measured: projection, head_backward, head_forward."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mebp_mlx
from bench import report
from mebp_mlx.engine.zeroth_order import make_estimator
from mebp_mlx.kernels.linear_cross_entropy import COLUMNS, ROWS
from mebp_mlx.ops.plan import SAVE_INPUTS, SAVE_PRODUCTS, Plan
from mebp_mlx.planner.work import Rates, Work, bound_s, count
from mebp_mlx.planner.workload import Workload
from mebp_mlx.system.child import run_child
from mebp_mlx.system.phone import DEVICES
from mebp_mlx.testing.synth import SHAPES, write_model

CALIBRATED_BY = ("qwen2.5-0.5b", "mezo")
ENGINES = ("mezo", "mebp")
HEADS = ["shape", "engine", "GFLOP", "GB", "bound s", "predicted s", "paper s", "error", "ours s"]


def projection(argv: Sequence[str]) -> None:
    """The iPhone proxy: the time of a step on a phone's chip, from counted operations and bytes.

    For each of the paper's shapes and each engine it prints the roofline bound at the chip's published peak rates, in
    16 bits with packed weights; the time at the efficiency of the paper's MeZO step of Qwen2.5-0.5B on that chip (this
    efficiency predicts the nine other steps, with the paper's policy; the errors are the proxy's); and the time of our
    step with saved products at the same efficiency. With --measured DIR (results of step_table and per_layer), this
    machine's times are scaled by the ratio of the two rooflines, for the whole step and by phase.
    """
    options = _options(argv)
    phone = DEVICES[options.device]
    shapes = dict.fromkeys([CALIBRATED_BY[0], *options.shapes])
    workloads = {shape: workloads_of(shape, options.tokens) for shape in shapes}
    rates = Rates(phone.flops[2], phone.bandwidth)
    efficiency = efficiency_of(workloads[CALIBRATED_BY[0]], rates)
    if options.tokens != 256:
        efficiency = math.nan  # the paper's steps have 256 tokens
    cases = [(shape, engine) for shape in options.shapes for engine in ENGINES]
    rows = [row_of(shape, engine, workloads[shape], rates, efficiency) for shape, engine in cases]
    print("\n".join(f"assumed    {text}" for text in phone.assumptions))
    if not math.isnan(efficiency):
        shape, engine = CALIBRATED_BY
        print(f"calibrated the paper's {shape} {engine} step runs at {efficiency:.1%} of the roofline's speed")
    print(report.table(HEADS, [_line(row) for row in rows]))
    errors = [abs(r["error"]) for r in rows if r["error"] is not None and (r["shape"], r["engine"]) != CALIBRATED_BY]
    if errors and not math.isnan(efficiency):
        mean = sum(errors) / len(errors)
        print(f"predicted  {len(errors)} of the paper's steps: mean error {mean:.0%}, largest {max(errors):.0%}")
    more: dict[str, Any] = {"assumptions": phone.assumptions, "efficiency": efficiency}
    if options.measured is not None:
        more["scaled"] = _Scaled(options.measured, workloads, rates).rows
        heads = ["shape", "engine", "of", "measured s", "roofline ratio", f"on {phone.chip} s", "paper s"]
        print(report.table(heads, [list(row.values()) for row in more["scaled"]]))
    report.publish("projection", options, rows, None if math.isnan(efficiency) else draw, **more)


def _options(argv: Sequence[str]) -> Any:
    parser = report.parser("projection", projection.__doc__)
    parser.add_argument("--device", default="a17-pro", choices=list(DEVICES))
    parser.add_argument("--shapes", nargs="+", default=list(report.PAPER), choices=list(report.PAPER))
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    parser.add_argument("--measured", type=Path, help="folder with this machine's step_table.csv and per_layer.csv")
    options = parser.parse_args(argv)
    if options.measured is not None and not (options.measured / "step_table.csv").is_file():
        parser.error(
            f"--measured {options.measured}: contains no step_table.csv (python -m bench step_table --out DIR)"
        )
    return options


def workloads_of(shape: str, n_tokens: int, dtype: str = "bfloat16", weights: str = "packed") -> dict[str, Workload]:
    """The workload of each engine, from the shape's file headers only."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(shape, Path(scratch) / "model", sparse=True)
        model = mebp_mlx.open_model(folder, dtype, weights)
        lora = mebp_mlx.init_lora(model)
        exact = Workload(model, lora, 1, n_tokens)
        model.weights.close()
        return {
            "mezo": dataclasses.replace(exact, estimator=make_estimator("mezo", lora, seed=0, eps=1e-2)),
            "mebp": exact,
        }


def counted(workloads: dict[str, Workload], engine: str, policy: str) -> dict[str, Work]:
    saved = SAVE_INPUTS if policy == "the paper's" else SAVE_PRODUCTS
    return count(workloads[engine], Plan("block", saved, weight_block_bytes=None, head_block_bytes=None))


def efficiency_of(workloads: dict[str, Workload], rates: Rates) -> float:
    """The speed of the paper's step of CALIBRATED_BY, relative to the roofline."""
    shape, engine = CALIBRATED_BY
    return bound_s(counted(workloads, engine, "the paper's"), rates) / report.PAPER[shape][f"{engine}_s"]


def row_of(shape: str, engine: str, workloads: dict[str, Workload], rates: Rates, efficiency: float) -> dict[str, Any]:
    """A shape's step with an engine: counts, bounds, the times at this efficiency, and the paper's time."""
    ours, theirs = counted(workloads, engine, "ours"), counted(workloads, engine, "the paper's")
    total = sum(ours.values(), Work())
    paper_s = report.PAPER[shape][f"{engine}_s"]
    predicted_s = bound_s(theirs, rates) / efficiency
    return {
        "shape": shape,
        "engine": engine,
        "tokens": workloads[engine].T,
        "gflop": round(total.flops / 1e9, 1),
        "memory_gb": round(total.memory_bytes / 1e9, 3),
        "bound_s": round(bound_s(ours, rates), 4),
        "bound_by_phase_s": {phase: round(rates.bound_s(work), 4) for phase, work in ours.items()},
        "paper_policy_s": None if math.isnan(predicted_s) else round(predicted_s, 3),
        "paper_s": paper_s,
        "error": None if math.isnan(predicted_s) else round(predicted_s / paper_s - 1, 4),
        "ours_s": None if math.isnan(predicted_s) else round(bound_s(ours, rates) / efficiency, 3),
    }


def _line(row: dict[str, Any]) -> list[Any]:
    counts = [row["gflop"], row["memory_gb"], row["bound_s"], row["paper_policy_s"], row["paper_s"]]
    error = "-" if row["error"] is None else f"{row['error']:+.0%}"
    if row["error"] is not None and (row["shape"], row["engine"]) == CALIBRATED_BY:
        error = "calibrated"
    return [row["shape"], row["engine"], *counts, error, row["ours_s"]]


class _Scaled:
    """`rows`: this machine's times, multiplied by the ratio of the phone's bound to this machine's bound."""

    def __init__(self, folder: Path, workloads: dict[str, dict[str, Workload]], rates: Rates):
        self.workloads, self.rates = workloads, rates
        measured = run_child(["mebp_mlx.system.rates"], {}, offline=True)
        self.host = Rates(measured["flops"], measured["memory_bytes"])
        speeds = f"{self.host.flops / 1e9:,.0f} GFLOP/s in {measured['dtype']}, {self.host.memory_bytes / 1e9:.1f} GB/s"
        print(f"this host  {speeds}, measured now; weights decompressed")
        self.rows: list[dict[str, Any]] = []
        self._here: dict[str, dict[str, Workload]] = {}
        for row in report.read(folder, "step_table")[0]:
            if row["shape"] in workloads and row["engine"] in ENGINES and row["layers"] == "all":
                self._add(row["shape"], row["engine"], None, row["step_s"]["median"], row["tokens"], row.get("plan"))
        if (folder / "per_layer.csv").exists():
            self._add_phases(*report.read(folder, "per_layer"))

    def _add_phases(self, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
        settings = about["settings"]
        if settings["shape"] not in self.workloads or settings["layers"] is not None:
            return
        plan = about.get("totals", {}).get("mebp", {}).get("plan")
        for kind, phase in (("f", "forward"), ("h", "head"), ("b", "backward")):
            own = [row for row in rows if row["case"] == "mebp" and row["phase"].startswith(kind)]
            seconds = sum(row["ms"]["median"] for row in own) / 1e3
            self._add(settings["shape"], "mebp", phase, seconds, settings["tokens"], plan)

    def _add(self, shape: str, engine: str, phase: str | None, seconds: float, tokens: int, plan: Any) -> None:
        if tokens != self.workloads[shape][engine].T:
            return
        if plan is None:
            report.refuse(f"--measured: the result of {shape}, {engine} has no plan; measure it again")
        if shape not in self._here:
            self._here[shape] = workloads_of(shape, tokens, "float32", "decompressed")
        phone = counted(self.workloads[shape], engine, "ours")
        here = count(self._here[shape][engine], Plan.from_dict(plan))
        if phase is None:
            ratio = bound_s(phone, self.rates) / bound_s(here, self.host)
        else:
            ratio = self.rates.bound_s(phone[phase]) / self.host.bound_s(here[phase])
        self.rows.append(
            {
                "shape": shape,
                "engine": engine,
                "phase": phase or "step",
                "measured_s": round(seconds, 3),
                "ratio": round(ratio, 5),
                "scaled_s": round(seconds * ratio, 4),
                "paper_s": report.PAPER[shape][f"{engine}_s"] if phase is None else None,
            }
        )


def draw(plt: Any, rows: report.Rows, options: Any) -> tuple[Any, str]:
    """Bars: the paper's seconds, the predicted ones, and ours at the same efficiency; left MeZO, right MeBP."""
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True)
    series = (
        ("paper_s", "the paper, measured", "0.55"),
        ("paper_policy_s", "predicted, the paper's policy", "C0"),
        ("ours_s", "predicted, ours (products saved)", "C1"),
    )
    for axes, engine in zip(panels, ENGINES, strict=True):
        own = [row for row in rows if row["engine"] == engine]
        for number, (key, label, color) in enumerate(series):
            if engine == "mezo" and key == "ours_s":
                continue  # MeZO saves nothing, so both policies are equal
            at = [place + 0.27 * (number - 1) for place in range(len(own))]
            axes.bar(at, [row[key] for row in own], 0.27, label=label, color=color)
        axes.set_xticks(range(len(own)), [row["shape"] for row in own], rotation=20, ha="right")
        axes.grid(axis="x", visible=False)
        axes.set_title("MeZO" if engine == "mezo" else "MeBP", fontsize=9)
        axes.legend(fontsize=7, loc="upper left")
        axes.margins(y=0.2)
    panels[0].set_ylabel(f"seconds per step on {DEVICES[options.device].chip.partition(' (')[0]}")
    figure.suptitle(f"T = {options.tokens}, batch 1, rank 8: counted, then calibrated on the paper's MeZO at 0.5B")
    return figure, "a projection: nothing ran on a phone"


# ----------------------------------------------------------------------------------------------- the head

THREADS = 1024  # Metal's limit for a threadgroup
REGISTERS = 96  # of 32 bits that a thread of such a threadgroup can have, at most (an estimate)


@dataclass(frozen=True)
class Gpu:
    """Published peak rates, operations and bytes per second; share: of the peak that MLX's 16-bit products reach."""

    name: str
    flops: float
    bandwidth: float
    share: float


# Shares: published for float16 on M1 Max (M2: the same generation) and M3 Pro; the others are taken to be as M3.
GPUS = (
    Gpu("A17 Pro", 2.15e12, 51.2e9, 0.6),
    Gpu("M2 (10 cores)", 3.6e12, 100e9, 0.76),
    Gpu("M3 Max (40)", 14.2e12, 400e9, 0.6),
    Gpu("M4 (10)", 4.3e12, 120e9, 0.6),
)
KERNEL_SHARE = 0.45  # of the peak, linear_cross_entropy: an estimate (float tiles, no double buffering)
WAIT_S = 0.2e-3  # of a small evaluation that is waited for (published: 0.15 to 0.25 ms)


@dataclass(frozen=True)
class Way:
    """operations: multiplications and additions; n_bytes: device memory traffic; registers: one thread's part of a sum
    [32, D] in a threadgroup of 1,024 threads.
    """

    name: str
    operations: float
    n_bytes: float
    registers: float = 0

    def bound_s(self, gpu: Gpu) -> float:
        return max(self.operations / gpu.flops, self.n_bytes / gpu.bandwidth)


def ways(T: int, V: int, D: int, item_bytes: int = 2) -> list[Way]:
    """The three methods for T labelled rows, 4-bit weights in groups of 64, 16-bit activations."""
    weights = V * D * (4 / 8 + 2 * item_bytes / 64)
    rows, logits = T * D, T * V
    chunk = Plan(head_block_bytes=None).vocabulary_chunk(T, 0, item_bytes)
    n_chunks = math.ceil(V / chunk)
    two_products = 4.0 * T * V * D
    # z and p are written and read; the sum [T, D] is read and written for every chunk.
    a_bytes = 2 * weights + 4 * logits * item_bytes + 2 * n_chunks * rows * 4 + n_chunks * rows * item_bytes
    n_tiles = math.ceil(T / ROWS)
    splits = max(1, 40 // n_tiles)  # of the vocabulary, so that 40 cores have work; each has a sum of its own
    return [
        Way("A: two products and online_softmax", two_products, a_bytes),
        Way(
            "B: one kernel, dh in registers",
            two_products,
            weights + rows * item_bytes + 2 * splits * rows * 4,
            ROWS * D / THREADS,
        ),
        Way(
            "C: one kernel, dh in device memory",
            two_products,
            2 * weights + n_tiles * ROWS * D * 4 * 2 * math.ceil(V / COLUMNS),
        ),
    ]


def head_backward(argv: Sequence[str]) -> None:
    """Why the head's dh has no kernel of its own: bytes and operations of three methods, and bounds on four GPUs.

        A  z = h W^T by quantized_matmul, online_softmax, p W by quantized_matmul: logits pass through memory
        B  one kernel that sums 32 rows of dh in the registers of 1,024 threads, as flash attention does
        C  one kernel, dh in device memory, read and written once for every tile of 64 columns of logits

    Nothing is timed. The rates are published; a bound is the larger of operations / rate and bytes / bandwidth. B saves
    the time of the additional bytes that A moves.
    """
    parser = report.Parser("head_backward", head_backward.__doc__)
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    options = parser.parse_args(argv)
    rows, lines = [], []
    for shape, V, D in _heads():
        first, *_ = found = ways(options.tokens, V, D)
        for way in found:
            bounds = {gpu.name: way.bound_s(gpu) for gpu in GPUS}
            saved = {gpu.name: (first.n_bytes - way.n_bytes) / gpu.bandwidth for gpu in GPUS}
            sizes = [way.operations / 1e9, way.n_bytes / 1e6, way.registers or None]
            lines.append([shape, way.name, *sizes, *(1e3 * bounds[g.name] for g in GPUS), 1e3 * saved["M2 (10 cores)"]])
            counts = {"operations": way.operations, "n_bytes": way.n_bytes, "registers": way.registers}
            rows.append({"shape": shape, "way": way.name[0], **counts, "bound_s": bounds, "saved_s": saved})
    print(f"T = {options.tokens}; bounds from published rates, nothing measured; about {REGISTERS} registers a thread")
    gpus = [f"{gpu.name}, ms" for gpu in GPUS]
    print(report.table(["shape", "way", "GFLOP", "MB", "registers", *gpus, "passes saved on M2, ms"], lines))
    print(json.dumps({"bench": "head_backward", "tokens": options.tokens, "rows": rows}))


def forward_s(gpu: Gpu, T: int, V: int, D: int, logits_block_bytes: int, waits: bool) -> tuple[float, float]:
    """Seconds of the loss alone by linear_cross_entropy, and by quantized_matmul and online_softmax.

    waits: whether each chunk's logits and state are waited for, as in the smallest plan.
    """
    operations = 2.0 * T * V * D
    n_chunks = math.ceil(
        V / Plan(head_block_bytes=None, logits_block_bytes=logits_block_bytes).vocabulary_chunk(T, 0, 2)
    )
    passes_s = 3 * 2 * T * V / (0.75 * gpu.bandwidth)  # z written and read, p written
    kernel_s = operations / (KERNEL_SHARE * gpu.flops)
    return kernel_s, operations / (gpu.share * gpu.flops) + passes_s + 2 * WAIT_S * n_chunks * waits


def head_forward(argv: Sequence[str]) -> None:
    """When linear_cross_entropy beats quantized_matmul and online_softmax for the loss alone: counted, not measured.

    The kernel's share of the peak is an estimate, MLX's are published. In the smallest plan every chunk of 1 MiB of
    logits is waited for twice; in the others the GPU has the next chunk while one is waited for.
    """
    parser = report.Parser("head_forward", head_forward.__doc__)
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    options = parser.parse_args(argv)
    rows, lines = [], []
    for shape, V, D in _heads():
        for gpu in GPUS:
            kernel_s, waiting_s = forward_s(gpu, options.tokens, V, D, 1 << 20, True)
            lazy_s = forward_s(gpu, options.tokens, V, D, 8 << 20, False)[1]
            used = "the smallest plan" if kernel_s < waiting_s else "no plan"
            used = "every plan" if kernel_s < lazy_s else used
            lines.append([shape, gpu.name, 1e3 * kernel_s, 1e3 * waiting_s, 1e3 * lazy_s, used])
            seconds = {"kernel_s": kernel_s, "waiting_s": waiting_s, "lazy_s": lazy_s}
            rows.append({"shape": shape, "gpu": gpu.name, **seconds})
    print(f"T = {options.tokens}; from published rates, nothing measured; the kernel at {KERNEL_SHARE:.0%} of the peak")
    heads = ["shape", "GPU", "kernel ms", "products ms, smallest plan", "other plans", "the kernel wins in"]
    print(report.table(heads, lines))
    print(json.dumps({"bench": "head_forward", "tokens": options.tokens, "rows": rows}))


def _heads() -> list[tuple[str, int, int]]:
    """(shape, V, D)."""
    configs = {shape: SHAPES[shape] for shape in ("qwen2.5-0.5b", "qwen2.5-3b", "gemma3-4b")}
    return [(shape, c["vocab_size"], c.get("text_config", c)["hidden_size"]) for shape, c in configs.items()]


PICTURES = {"projection": draw}
BENCHES: dict[str, report.Bench] = {
    "projection": projection,
    "head_backward": head_backward,
    "head_forward": head_forward,
}


def main(argv: Sequence[str] | None = None) -> object:
    return report.pick(BENCHES, argv, default="projection")


if __name__ == "__main__":
    report.run(main)
