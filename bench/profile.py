"""Where a training step's time goes: each stage's wall time, and its products' speed against a bare BLAS product.

The engine is timed from outside: its functions are wrapped, and what they return is evaluated at once. A stage's
time is what is left after the stages inside it are taken away; a product's includes its block of the LoRA pair.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mebp_mlx  # isort: skip
import mlx.core as mx
import numpy as np

from bench.instruments import Clock, Wraps, evaluate
from bench.synth import SHAPES, write_model
from mebp_mlx.data import Batch
from mebp_mlx.engine import attend, backprop, block, make_engine, mlp, projection
from mebp_mlx.engine import head as engine_head
from mebp_mlx.engine.arena import Arena
from mebp_mlx.engine.plan import Plan
from mebp_mlx.engine.update import Updater
from mebp_mlx.model.frozen import Model
from mebp_mlx.optimizers import PlainSGD
from mebp_mlx.weights import MappedWeights


class Instruments(Wraps):
    """The clock around every stage."""

    def __init__(self, clock: Clock):
        super().__init__(clock)
        self.wrap(block._Work, "_forward", lambda work, stage, *_: self._stage(stage, "forward"))
        self.wrap(block._Work, "_backward", lambda work, stage, *_: self._stage(stage, "backward"))
        self._product(projection.RowStream, "forward", "y = x W^T")
        self._product(projection.RowStream, "backward", "dx = g W")
        self._product(projection.ColumnStream, "forward", "y = x W^T")
        self._product(projection.ColumnStream, "cotangent", "dx = g W")
        for owner, names in (
            (projection.RowStream, ("__init__", "finish")),
            (projection.ColumnStream, ("__init__", "take", "gradients")),
        ):
            for name in names:
                self.wrap(owner, name, lambda *_: "LoRA: x A and gradients")
        self.wrap(mlp.BlockwiseMlp, "forward", lambda *_: "mlp: activation, forward")
        self.wrap(mlp.BlockwiseMlp, "backward", lambda *_: "mlp: activation, backward")
        self.wrap(MappedWeights, "rows", lambda *_: "weights: read")
        self.wrap(MappedWeights, "columns", lambda *_: "weights: read")
        self.wrap(Model, "columns", lambda *_: "weights: decompress")
        self.wrap(MappedWeights, "gather", lambda *_: "weights: read")
        self.wrap(Model, "rows", lambda *_: "weights: decompress")
        self.wrap(Model, "gather", lambda *_: "weights: decompress")
        self.wrap(Model, "norm", lambda *_: "weights: norms")
        self.wrap(Arena, "put", lambda *_: "arena: put")
        self.wrap(Arena, "get", lambda *_: "arena: get")
        self.wrap(attend.TileAttention, "__init__", lambda *_: "attention: split, rope")
        self.wrap(attend.TileAttention, "forward", lambda *_: "attention: forward")
        self.wrap(attend.TileAttention, "backward", lambda *_: "attention: backward")
        self.wrap(attend.TileAttention, "finish", lambda *_: "attention: split, rope")
        self.wrap(engine_head, "run", lambda *_: "head: products, norm and its backward")
        self.wrap(engine_head, "online_softmax", lambda *_: "head: exp")
        self.wrap(backprop, "embed_tiles", lambda *_: "embedding")
        self.wrap(Updater, "sink", lambda *_: "update")

    def _stage(self, stage: Any, direction: str) -> str:
        if stage.linears:
            return "engine: a projection's surroundings"
        return f"{'norms' if 'norm' in stage.name else stage.name}: {direction}"

    def _product(self, owner: Any, name: str, what: str) -> None:
        original, clock = getattr(owner, name), self.clock

        def wrapped(stream: Any, start: int, stop: int, *rest: Any) -> Any:
            evaluate(rest)
            linear = stream.linear
            label = f"{linear.name.rsplit('.', 1)[-1]}: {what}"
            value = clock.timed(label, lambda: original(stream, start, stop, *rest))
            by_rows = owner is projection.RowStream
            width = linear.in_dims if by_rows else linear.out_dims
            known = (rest[0] if rest else stream.x) if by_rows else (stream.y if stream.g is None else stream.g)
            made = not (rest and rest[-1] is False)  # a backward for the pair alone makes no product with W
            if known is not None and made:
                n_rows = known.shape[0]
                clock.flops[label] = clock.flops.get(label, 0) + 2 * n_rows * (stop - start) * width
                clock.shapes[label] = (n_rows, width, stop - start)
            return value

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


def profile(folder: Path, n_tokens: int, rank: int, repeats: int) -> dict[str, Any]:
    """{"step": rows, "forward": rows} with ms per call of the whole, and the times without instruments."""
    model = mebp_mlx.open_model(folder)
    lora = mebp_mlx.init_lora(model, rank=rank)
    engine = make_engine("mebp", model, lora)
    updater = Updater(PlainSGD(learning_rate=1e-4), lora)
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, model.spec.V, (2, 1, n_tokens)).astype(np.int32)
    batch = Batch(tokens, targets, rows=("random",), n_labels=n_tokens)
    engine.reserve(1, n_tokens)

    def step() -> None:
        updater.begin_step()
        engine.step(batch, step=0, micro=0, n_labels=n_tokens, sink=lambda grads: updater.sink(grads))
        updater.end_step()

    def forward() -> None:
        engine.evaluate(batch)

    found: dict[str, Any] = {}
    bare: dict[tuple[tuple[int, int, int], bool], float] = {}
    plain: dict[str, list[float]] = {"step": [], "forward": []}
    forward()
    for _ in range(repeats):
        for name, run in (("step", step), ("forward", forward)):
            began_s = time.perf_counter()
            run()
            plain[name].append(time.perf_counter() - began_s)
    for name, run in (("step", step), ("forward", forward)):
        clock = Clock()
        instruments = Instruments(clock)
        try:
            for _ in range(repeats):
                clock.timed("the rest", run)
        finally:
            instruments.remove()
        head_rows = Plan().vocabulary_chunk(n_tokens, model.spec.D, 4)
        update = "head: products, norm and its backward"
        n_products = 2 if name == "step" else 1
        clock.flops[update] = 2.0 * n_products * n_tokens * model.spec.D * model.spec.V * repeats
        clock.shapes[update] = (n_tokens, model.spec.D, head_rows)
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
        found[name] = {
            "ms": round(1e3 * total_s / repeats, 1),
            "plain_ms": round(1e3 * statistics.median(plain[name]), 1),
            "stages": rows,
        }
    ratios = [s / (2 * f) for s, f in zip(plain["step"], plain["forward"], strict=True)]
    found["step_over_two_forwards"] = round(statistics.median(ratios), 3)
    engine.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=2, help="blocks of the model (default 2); its head is whole")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a model already written (default: one of --shape)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or write_model(options.shape, Path(scratch) / "model", layers=options.layers)
        found = profile(folder, options.tokens, options.rank, options.repeats)
    for name in ("step", "forward"):
        part = found[name]
        print(f"\n{name}: {part['plain_ms']} ms ({part['ms']} ms with the clock in it)")
        print(f"{'stage':40}{'ms':>9}{'share':>8}{'GFLOP/s':>9}{'bare':>7}")
        for row in part["stages"]:
            speed = f"{row['gflops']:9.1f}{row['bare_gflops']:7.1f}" if "gflops" in row else ""
            print(f"{row['stage']:40}{row['ms']:9.2f}{row['share']:8.1%}{speed}")
    sizes = {"shape": options.shape, "layers": options.layers, "tokens": options.tokens, "rank": options.rank}
    print(json.dumps({"bench": "profile", **sizes, **found}))


if __name__ == "__main__":
    main()
