"""`python -m bench.layers MODEL --case NAME`: a training step phase by phase; JSON on the last line.

What bench.per_layer and bench.decompression start, a process a case, since a footprint's peak is a process's. Phases:
`emb`, `f0` to `fN`, `head`, `bN` to `b0`; a zeroth-order step's passes are added up. Three kinds of steps: timed phase
by phase only; one for memory, in which the C heap is trimmed at a phase's end (glibc keeps what a phase has freed,
and the footprint would never fall), with the footprint's peak within each phase, what is left at its end, and the peak
of MLX's own count of its arrays; and steps in which every read, decompression and kept value is timed too, each
evaluated at once, whose sum is a little more.

read: weights copied out of the mapped files. decompress: packed weights into the compute dtype; on the CPU, affine
weights go straight from the map, so that waiting for their pages counts here. save: values kept and taken back, in
memory or in the file. compute: all the rest, the update included: a block's with its backward, a zeroth-order one at
the end, in `head`.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mebp_mlx  # noqa: F401  # isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx

from bench.instruments import Clock, Phases, Wraps
from bench.report import positive, spread
from bench.stepper import Stepper, add_memory_budget
from mebp_mlx.engine.base import Store
from mebp_mlx.model.base import Model
from mebp_mlx.ops.plan import SAVE_INPUTS
from mebp_mlx.system.footprint import PeakMeter, footprint_bytes
from mebp_mlx.weights.safetensors import MappedWeights

CASES = {
    "mebp": "MeBP, products saved",
    "mebp-inputs": "MeBP, inputs saved (the paper's policy)",
    "mezo": "MeZO, both passes",
}
SPLITS = ("read", "decompress", "compute", "save")


def measure(folder: Path, case: str, n_tokens: int, n_steps: int, **options: Any) -> dict[str, Any]:
    """{"phases": rows, "step_ms", "split_step_ms", ...}: a row a phase, in their order; ms, MB.

    options: of TrainConfig.
    """
    before_bytes = footprint_bytes()
    with PeakMeter() as meter:
        stepper = _stepper(folder, case, n_tokens, options)
        stepper.step(0)  # the system gives the arena's file its pages
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
                "case": case,
                "phase": phase,
                "ms": spread([1e3 * seconds[phase] for seconds in times.seconds], 3),
                "split_ms": {part: spread(values, 3)["median"] for part, values in split.items()},
                "peak_mb": round(meter.phases[phase] / 1e6, 2),
                "end_mb": round(memory.end_bytes[phase] / 1e6, 2),
                "arrays_mb": round(memory.arrays_bytes[phase] / 1e6, 2),
            }
        )
    return {
        "case": case,
        "phases": rows,
        "step_ms": spread([1e3 * seconds for seconds in step_s], 3),
        "split_step_ms": spread([1e3 * sum(clock.seconds.values()) for clock in clocks], 3),
        "peak_mb": round(peak_bytes / 1e6, 1),
        "before_mb": round(before_bytes / 1e6, 1),
        "lora_mb": round(4e-6 * stepper.n_parameters, 1),
        "plan": stepper.plan_record,
    }


def _stepper(folder: Path, case: str, n_tokens: int, options: dict[str, Any]) -> Stepper:
    options = {"optimizer": "sgd", "engine": "mezo" if case == "mezo" else "mebp", **options}
    stepper = Stepper(folder, n_tokens, **options)
    if case != "mebp-inputs":
        return stepper
    assert stepper.planned is not None
    plan = dataclasses.replace(stepper.planned.plan, saved=SAVE_INPUTS)
    stepper.close()
    return Stepper(stepper.model, n_tokens, known=plan, **options)


def _in_phases(stepper: Stepper, number: int, around: Callable[[str, Callable[[], Any]], Any]) -> float:
    """Seconds of a step, each of whose phases is run by `around`."""
    phases = Phases(around)
    try:
        return stepper.timed_step(number)
    finally:
        phases.remove()


class _Times:
    """Seconds of whole phases, step by step."""

    def __init__(self) -> None:
        self.seconds: list[dict[str, float]] = []

    def around(self, phase: str, run: Callable[[], Any]) -> Any:
        began_s, known = time.perf_counter(), self.seconds[-1]
        value = run()
        mx.eval(value)
        known[phase] = known.get(phase, 0.0) + time.perf_counter() - began_s
        return value


class _Memory:
    """Footprints of whole phases: the process's, what is left at their ends, and MLX's own peaks."""

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
    """Give freed pages of the C heap back to the system (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _split(stepper: Stepper, number: int) -> Clock:
    """Seconds by "phase|part" of one step."""
    clock, inside = Clock(), Wraps()
    phases = Phases(lambda phase, run: clock.timed(f"{phase}|compute", run))
    for owner, names, part in (
        (MappedWeights, ("rows", "columns", "gather"), "read"),
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.layers", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--case", default="mebp", choices=list(CASES))
    parser.add_argument("--tokens", type=positive, default=256)
    parser.add_argument("--steps", type=positive, default=3)
    parser.add_argument("--rank", type=positive, default=8)
    add_memory_budget(parser, None, "as the trainer's")
    options = parser.parse_args()
    more = {"rank": options.rank, "memory_budget": options.memory_budget}
    print(json.dumps(measure(options.model, options.case, options.tokens, options.steps, **more)))


if __name__ == "__main__":
    main()
