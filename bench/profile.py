"""The time of a training step by stage, and the speed of its products: `python -m bench.profile`.

The engine is timed from outside (bench/instruments.py). The time of a stage excludes the stages inside it; the time of
a product includes its block of the LoRA pair. "bare" is the speed of an isolated product of the same shape.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mebp_mlx  # noqa: F401  # isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx

from bench import report
from bench.case import Stepper, add_memory_budget, plan_line
from bench.instruments import Clock, Wraps
from mebp_mlx.engine import backprop, base
from mebp_mlx.engine.base import Store
from mebp_mlx.families.base import Block, value
from mebp_mlx.families.gemma3 import Gemma3Block
from mebp_mlx.families.llama import LlamaBlock
from mebp_mlx.kernels import cpu
from mebp_mlx.model.base import Model, Tensor
from mebp_mlx.model.config import Linear
from mebp_mlx.ops import cross_entropy as head
from mebp_mlx.ops.attention import Attention
from mebp_mlx.ops.gated_mlp import Gate, GatedMlp
from mebp_mlx.ops.lora_linear import Backward, Input, LoraLinear
from mebp_mlx.testing.synth import SHAPES
from mebp_mlx.training.update import Updater

LORA, HEAD, SPLIT = "LoRA: x A and gradients", "head: products, norm and its backward", "attention: split, rope"
STAGES: list[tuple[Any, str, str]] = [
    *(
        (owner, name, LORA)
        for owner, names in (
            (LoraLinear, ("low_rank", "add")),
            (Backward, ("__init__", "finish")),
            (Input, ("__init__", "output", "take", "finish")),
        )
        for name in names
    ),
    *((GatedMlp, name, "mlp: sums of blocks") for name in ("__call__", "backward")),
    (Gate, "__call__", "mlp: activation, forward"),
    (Gate, "backward", "mlp: activation, backward"),
    (Tensor, "__getitem__", "weights: read"),
    (Model, "_dense", "weights: decompress"),
    (Model, "norms", "weights: norms"),
    *((Store, name, "store: put") for name in ("put", "write_behind")),
    *((Store, name, "store: get") for name in ("get", "take")),
    (Attention, "append", SPLIT),
    (Attention, "cotangents", SPLIT),
    (Attention, "__call__", "attention: forward"),
    (Attention, "backward", "attention: backward"),
    (Block, "norm_backward", "norms: backward"),
    *((kind, "backward", "residual sums, backward") for kind in (LlamaBlock, Gemma3Block)),
    *((engine, "cross_entropy", HEAD) for engine in (backprop, base)),
    *((owner, name, "head: exp") for owner, name in ((cpu, "online_softmax"), (head, "softmax_kernel"))),
    (base.Pass, "embed", "embedding"),
    (Updater, "sink", "update"),
]


class Instruments(Wraps):
    """Times every stage."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock = clock
        for owner, name, stage in STAGES:
            self.wrap(clock, owner, name, stage)
        for block in (LlamaBlock, Gemma3Block):
            for name in ("h", "h2", "x1", "y"):
                equation: value = getattr(block, name)
                self.wrap(clock, equation, "equation", "norms, residual sums: forward")
        self._product(LoraLinear, "rows", "y = x W^T", lambda linear: linear)
        self._product(Backward, "take", "dx = g W", lambda backward: backward.linear if backward.need_dx else None)
        self._product(Input, "add", "y = x W^T", lambda source: source.linear)
        self._product(Input, "cotangent", "dx = g W", lambda source: source.linear)

    def _product(self, owner: Any, name: str, what: str, linear_of: Callable[[Any], LoraLinear | None]) -> None:
        """Times owner.name(..., start, stop, ...) as a product of the projection; None: it has no product."""
        original, clock = getattr(owner, name), self.clock

        def wrapped(work: Any, *args: Any) -> Any:
            mx.eval(args)
            linear = linear_of(work)
            if linear is None:
                return clock.timed(LORA, lambda: original(work, *args))
            spec: Linear = linear.linear
            label = f"{spec.name.rsplit('.', 1)[-1]}: {what}"
            result = clock.timed(label, lambda: original(work, *args))
            start, stop = [arg for arg in args if isinstance(arg, int)]
            is_by_rows = owner in (LoraLinear, Backward)  # else by columns of W
            width = spec.in_dims if is_by_rows else spec.out_dims
            known = next((arg for arg in args if isinstance(arg, mx.array)), getattr(work, "g", None))
            assert known is not None
            n_rows = known.size // known.shape[-1]
            clock.flops[label] = clock.flops.get(label, 0) + 2 * n_rows * (stop - start) * width
            clock.shapes[label] = (n_rows, width, stop - start)
            return result

        self.replace(owner, name, wrapped)


def bare_gflops(shape: tuple[int, int, int], transposed: bool, repeats: int = 7) -> float:
    """GFLOP/s of one evaluated float32 product: [N, in] x [rows, in]^T, or [N, rows] x [rows, in]."""
    n, n_in, rows = shape
    w = mx.random.normal((rows, n_in))
    x = mx.random.normal((n, n_in if transposed else rows))
    mx.eval(x, w)
    times_s = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        mx.eval(x @ w.T if transposed else x @ w)
        times_s.append(time.perf_counter() - began_s)
    return 2 * n * n_in * rows / statistics.median(times_s) / 1e9


def profile(folder: Path, n_tokens: int, repeats: int, **options: Any) -> dict[str, Any]:
    """{"step": ..., "forward": ...}: ms per call by stage, and in total without instruments.

    options: arguments of Stepper.
    """
    stepper = Stepper(folder, n_tokens, **options)

    def step() -> None:
        stepper.step(0)

    def forward() -> None:
        stepper.engine.evaluate(stepper.batch)

    runs: dict[str, Callable[[], None]] = {"step": step, "forward": forward}
    plain: dict[str, list[float]] = {"step": [], "forward": []}
    forward()
    for _ in range(repeats):
        for name, run in runs.items():
            began_s = time.perf_counter()
            run()
            plain[name].append(time.perf_counter() - began_s)
    result: dict[str, Any] = {}
    bare: dict[tuple[tuple[int, int, int], bool], float] = {}
    for name, run in runs.items():
        clock = _clocked(stepper, run, repeats, n_products=2 if name == "step" else 1)
        result[name] = {
            "ms": round(1e3 * sum(clock.seconds.values()) / repeats, 1),
            "plain_ms": round(1e3 * statistics.median(plain[name]), 1),
            "stages": _rows(clock, repeats, bare),
        }
    ratios = [s / (2 * f) for s, f in zip(plain["step"], plain["forward"], strict=True)]
    result["step_over_two_forwards"] = round(statistics.median(ratios), 3)
    result["plan"] = stepper.plan_record
    stepper.close()
    return result


def _clocked(stepper: Stepper, run: Callable[[], None], repeats: int, n_products: int) -> Clock:
    """Times every stage in `repeats` runs; n_products: the head's products in one run."""
    clock = Clock()
    instruments = Instruments(clock)
    try:
        for _ in range(repeats):
            clock.timed("the rest", run)
    finally:
        instruments.remove()
    assert stepper.planned is not None
    spec, n_tokens = stepper.model.spec, stepper.n_tokens
    head_bytes = stepper.model.copied_bytes(spec.head, spec.D)
    chunk = stepper.planned.plan.vocabulary_chunk(n_tokens, head_bytes, stepper.model.dtype.size)
    clock.flops[HEAD] = 2.0 * n_products * n_tokens * spec.D * spec.V * repeats
    clock.shapes[HEAD] = (n_tokens, spec.D, chunk)
    return clock


def _rows(clock: Clock, repeats: int, bare: dict[tuple[tuple[int, int, int], bool], float]) -> list[dict[str, Any]]:
    """A row for each stage, longest first. bare: GFLOP/s of bare products by shape; each shape is measured once."""
    total_s = sum(clock.seconds.values())
    rows = []
    for stage, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        row: dict[str, Any] = {"stage": stage, "ms": round(1e3 * seconds / repeats, 2)}
        row["share"] = round(seconds / total_s, 4)
        if stage in clock.flops:
            key = (clock.shapes[stage], "dx" not in stage)
            if key not in bare:
                bare[key] = bare_gflops(*key)
            row["gflops"] = round(clock.flops[stage] / seconds / 1e9, 1)
            row["bare_gflops"] = round(bare[key], 1)
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.Parser("profile", __doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--layers", type=report.positive, default=2, help="number of blocks (default: 2)")
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    parser.add_argument("--rank", type=report.positive, default=8)
    parser.add_argument("--repeats", type=report.positive, default=3)
    parser.add_argument("--model", type=Path, help="folder of an existing model (default: one of --shape)")
    add_memory_budget(parser, None, "the trainer's")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or report.model_of(options.shape, Path(scratch), options.layers)
        given = {"rank": options.rank, "optimizer": "sgd", "memory_budget": options.memory_budget}
        result = profile(folder, options.tokens, options.repeats, **given)
    print(f"plan       {plan_line(result['plan'])}")
    for name in ("step", "forward"):
        part = result[name]
        print(f"\n{name}: {part['plain_ms']} ms ({part['ms']} ms with instruments)")
        print(f"{'stage':40}{'ms':>9}{'share':>8}{'GFLOP/s':>9}{'bare':>7}")
        for row in part["stages"]:
            speed = f"{row['gflops']:9.1f}{row['bare_gflops']:7.1f}" if "gflops" in row else ""
            print(f"{row['stage']:40}{row['ms']:9.2f}{row['share']:8.1%}{speed}")
    sizes = {"shape": options.shape, "layers": options.layers, "tokens": options.tokens, "rank": options.rank}
    print(json.dumps({"bench": "profile", **sizes, **result}))


if __name__ == "__main__":
    report.run(main)
