"""`python -m bench.layers MODEL --case NAME`: a training step phase by phase; JSON on the last line.

What bench.per_layer and bench.decompression start, a process a case, since a footprint's peak is a process's. Phases:
`emb`, `f0` to `fN`, `head`, `bN` to `b0`; a zeroth-order step's passes are added up. First come steps that are timed
phase by phase only, with the footprint's peak within each phase, what is left at its end, and the peak of MLX's own
count of its arrays (on Linux the C heap keeps what a phase has freed: a footprint falls late or never). Then come steps
in which every read, decompression and arena access is timed too, each evaluated at once; their sum is a little more.

read: weights copied out of the mapped files. decompress: packed weights into the compute dtype; on the CPU, affine
weights go straight from the map, so that waiting for their pages counts here. save: the arena written and read back.
compute: all the rest, the update included: a block's with its backward, a zeroth-order one at the end, in `head`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mebp_mlx  # isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx
import numpy as np

from bench.instruments import Clock, Wraps, evaluate
from bench.report import positive, spread
from mebp_mlx.config import ZEROTH_ORDER
from mebp_mlx.data import Batch
from mebp_mlx.engine import backprop, make_engine
from mebp_mlx.engine import head as engine_head
from mebp_mlx.engine.arena import Arena
from mebp_mlx.engine.block import BlockRunner
from mebp_mlx.engine.choose import choose_plan
from mebp_mlx.engine.job import job_for
from mebp_mlx.engine.plan import SAVE_INPUTS, Plan
from mebp_mlx.engine.update import Updater
from mebp_mlx.engine.zeroth_order import make_estimator
from mebp_mlx.model.frozen import Model
from mebp_mlx.optimizers import PlainSGD
from mebp_mlx.runtime.footprint import PeakMeter, footprint_bytes
from mebp_mlx.weights import MappedWeights

CASES = {
    "mebp": "MeBP, products saved",
    "mebp-inputs": "MeBP, inputs saved (the paper's policy)",
    "mezo": "MeZO, both passes",
}
SPLITS = ("read", "decompress", "compute", "save")


class Phases:
    """Which phase the engine is in. `around(label, run)` runs each of them."""

    def __init__(self, around: Callable[[str, Callable[[], Any]], Any]):
        self.now, self._around = "", around
        self.wraps = Wraps(Clock())
        self._put(backprop, "embed_tiles", lambda *_: "emb")
        self._put(BlockRunner, "forward", lambda _, layer, *__: f"f{layer.index}")
        self._put(engine_head, "run", lambda *_: "head")
        self._put(BlockRunner, "backward", lambda _, layer, *__: f"b{layer.index}")
        self._put(Updater, "sink", lambda *_: self.now)  # of the block whose gradients they are

    def _put(self, owner: Any, name: str, label: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.now = label(*args)
            return self._around(self.now, lambda: original(*args, **kwargs))

        self.wraps.replace(owner, name, wrapped)


def measure(folder: Path, case: str, n_tokens: int, n_steps: int, rank: int) -> dict[str, Any]:
    """{"phases": rows, "step_ms", "split_step_ms", ...}: a row a phase, in their order; ms, MB."""
    name = "mezo" if case == "mezo" else "mebp"
    before_bytes = footprint_bytes()
    with PeakMeter() as meter:
        model = mebp_mlx.open_model(folder)
        lora = mebp_mlx.init_lora(model, rank=rank)
        job = job_for(model, lora, 1, n_tokens, engine=name, base_bytes=before_bytes)
        plan = Plan(saved=SAVE_INPUTS) if case == "mebp-inputs" else choose_plan(job)
        estimator = make_estimator(name, lora, seed=0, eps=1e-2) if name in ZEROTH_ORDER else None
        engine = make_engine(name, model, lora, plan=plan, estimator=estimator)
        updater = Updater(PlainSGD(learning_rate=1e-4), lora)
        tokens, targets = np.random.default_rng(0).integers(0, model.spec.V, (2, 1, n_tokens)).astype(np.int32)
        batch = Batch(tokens, targets, rows=("random",), n_labels=n_tokens)
        engine.reserve(1, n_tokens)

        def step(number: int) -> float:
            began_s = time.perf_counter()
            updater.begin_step()
            # Through the updater's attribute as it is now: the clock may be around it.
            engine.step(batch, step=number, micro=0, n_labels=n_tokens, sink=lambda g: updater.sink(g))
            updater.end_step()
            return time.perf_counter() - began_s

        step(0)  # the system gives the arena's file its pages
        step_s, whole = [], _Whole(meter)
        for number in range(n_steps):
            whole.seconds.append({})
            phases = Phases(whole.around)
            try:
                step_s.append(step(1 + number))
            finally:
                phases.wraps.remove()
        clocks = [_split(step, 1 + n_steps + number) for number in range(n_steps)]
        engine.close()
    rows = []
    for phase in whole.seconds[0]:
        split = {part: [1e3 * clock.seconds.get(f"{phase}|{part}", 0.0) for clock in clocks] for part in SPLITS}
        rows.append(
            {
                "case": case,
                "phase": phase,
                "ms": spread([1e3 * seconds[phase] for seconds in whole.seconds], 3),
                "split_ms": {part: spread(values, 3)["median"] for part, values in split.items()},
                "peak_mb": round(meter.phases[phase] / 1e6, 2),
                "end_mb": round(whole.end_bytes[phase] / 1e6, 2),
                "arrays_mb": round(whole.arrays_bytes[phase] / 1e6, 2),
            }
        )
    return {
        "case": case,
        "phases": rows,
        "step_ms": spread([1e3 * seconds for seconds in step_s], 3),
        "split_step_ms": spread([1e3 * sum(clock.seconds.values()) for clock in clocks], 3),
        "peak_mb": round(meter.peak_bytes / 1e6, 1),
        "before_mb": round(before_bytes / 1e6, 1),
        "lora_mb": round(sum(value.nbytes for value in lora.parameters().values()) / 1e6, 1),
    }


class _Whole:
    """Seconds and footprints of whole phases, step by step."""

    def __init__(self, meter: PeakMeter):
        self.meter = meter
        self.seconds: list[dict[str, float]] = []
        self.arrays_bytes: dict[str, int] = {}
        self.end_bytes: dict[str, int] = {}

    def around(self, phase: str, run: Callable[[], Any]) -> Any:
        with self.meter.phase(phase):
            mx.reset_peak_memory()
            began_s = time.perf_counter()
            value = run()
            evaluate(value)
            self.seconds[-1][phase] = self.seconds[-1].get(phase, 0.0) + time.perf_counter() - began_s
        self.arrays_bytes[phase] = max(self.arrays_bytes.get(phase, 0), mx.get_peak_memory())
        self.end_bytes[phase] = max(self.end_bytes.get(phase, 0), self.meter.mark())
        return value


def _split(step: Callable[[int], float], number: int) -> Clock:
    """Seconds by "phase|part" of one step."""
    clock = Clock()
    phases = Phases(lambda phase, run: clock.timed(f"{phase}|compute", run))
    inside = Wraps(clock)
    for owner, names, part in (
        (MappedWeights, ("rows", "columns", "gather"), "read"),
        (Model, ("rows", "columns", "gather"), "decompress"),
        (Arena, ("put", "get"), "save"),
    ):
        for name in names:
            inside.wrap(owner, name, lambda *_, part=part: f"{phases.now}|{part}")
    try:
        clock.timed("rest", lambda: step(number))
    finally:
        inside.remove()
        phases.wraps.remove()
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.layers", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--case", default="mebp", choices=list(CASES))
    parser.add_argument("--tokens", type=positive, default=256)
    parser.add_argument("--steps", type=positive, default=3)
    parser.add_argument("--rank", type=positive, default=8)
    options = parser.parse_args()
    print(json.dumps(measure(options.model, options.case, options.tokens, options.steps, options.rank)))


if __name__ == "__main__":
    main()
