"""Comparisons with mlx-lm's trainer and whole-graph checkpointing: versus and in_memory (`python -m bench NAME`)."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mebp_mlx  # isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from bench import report
from bench.case import Stepper, plan_line
from mebp_mlx.data.dataset import Batch, has_tokenizer, prepare
from mebp_mlx.data.rows import RowOptions
from mebp_mlx.engine.whole_graph import WholeGraphEngine
from mebp_mlx.model.lora import Lora
from mebp_mlx.system.footprint import PeakMeter
from mebp_mlx.testing.reference import mlx_lm_model
from mebp_mlx.testing.synth import SHAPES
from mebp_mlx.training.optimizers import PlainSGD
from mebp_mlx.weights.hub import resolve_model

CASES = {
    "ours": "mebp_mlx",
    "checkpoint-last-first": "whole graph, mx.checkpoint per block, last block's gradients first",
    "checkpoint-at-once": "whole graph, mx.checkpoint per block, all gradients at once",
    "mlx-lm-4bit": "mlx-lm's trainer, packed weights, its checkpointing",
    "mlx-lm-in-memory": "mlx-lm's trainer, decompressed in memory, no checkpointing",
}
LEARNING_RATE = 1e-4
OUR_CACHE_BYTES = 0  # system/allocator.py
Timed = list[tuple[float, float]]  # (loss, seconds) of each step


def versus(argv: Sequence[str]) -> None:
    """mebp_mlx, mlx-lm's trainer with packed and decompressed weights, and whole-graph checkpointing in two orders.

    All use the same initial LoRA values, rows, precision (float32), optimizer (Adam) and BLAS. Each run has its own
    process; the contestants are interleaved for a few rounds, so a busy machine affects all of them. All compute exact
    gradients, so their losses after N steps must agree.

        python -m bench versus                                     # the bundled model on its text
        python -m bench versus --shape qwen2.5-0.5b --layers 4     # a real shape's blocks and head, random weights
    """
    parser = report.parser("versus", versus.__doc__)
    _add_run(parser)
    parser.add_argument("--model", default="bundled", help="folder, hub id, or `bundled`")
    parser.add_argument(
        "--shape", choices=list(SHAPES), help="use random weights and tokens instead of --model and --data"
    )
    parser.add_argument("--layers", type=report.positive, help="number of blocks of --shape (default: all)")
    parser.add_argument("--rounds", type=report.positive, default=3)
    parser.add_argument("--without", nargs="*", default=[], choices=list(CASES), help="contestants to leave out")
    options = parser.parse_args(argv)
    if options.quick:
        options.steps, options.rounds, options.batch_size, options.tokens = 4, 1, 1, 64
    cases = [case for case in CASES if case not in options.without]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model
        if options.shape:
            model = report.model_of(options.shape, Path(scratch), options.layers)
        how = ["--steps", options.steps, "--batch-size", options.batch_size, "--tokens", options.tokens]
        for number in range(options.rounds):
            for case in cases:
                arguments = ["contestant", model, "--case", case, "--data", options.data, *how]
                result = report.run_module("bench.versus", *arguments)
                runs.append({"round": number, **result})
                seconds, peak_mb = result["step_s"]["median"], result["peak_mb"]
                print(f"round {number + 1}: {case}: {seconds} s, {peak_mb} MB", flush=True)
    rows = [_joined(case, runs) for case in cases]
    first = rows[0]["step_s"]["median"]
    heads = ["", "s per step", "over the first", "peak MB", f"loss of step {options.steps}"]
    print(report.table(heads, [_line(row, first) for row in rows]))
    report.publish("versus", options, rows, draw)


def _add_run(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a run, for the bench and its contestants."""
    parser.add_argument("--data", default="bundled", help="folder, hub id, or `bundled`")
    parser.add_argument("--steps", type=report.positive, default=20)
    parser.add_argument("--batch-size", type=report.positive, default=4)
    parser.add_argument("--tokens", type=report.positive, default=128, help="T (default: 128)")


def _line(row: dict[str, Any], first_s: float) -> list[Any]:
    seconds = row["step_s"]["median"]
    return [row["what"], seconds, seconds / first_s, row["peak_mb"], f"{row['last_loss']:.5f}"]


def _joined(case: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    own = [run for run in runs if run["case"] == case]
    return {
        "case": case,
        "what": CASES[case],
        "step_s": report.spread([run["step_s"]["median"] for run in own]),
        "peak_mb": max(run["peak_mb"] for run in own),
        "first_loss": own[0]["first_loss"],
        "last_loss": own[0]["last_loss"],
    }


def draw(plt: Any, rows: report.Rows, options: Any) -> tuple[Any, str]:
    """Bars: peak memory and time per step of each contestant."""
    figure, (memory, time) = plt.subplots(1, 2, figsize=(10, 2.9), sharey=True)
    names = [CASES[row["case"]].replace(", ", ",\n", 1) for row in rows]
    for axes, values, label in (
        (memory, [row["peak_mb"] for row in rows], "peak footprint, MB"),
        (time, [row["step_s"]["median"] for row in rows], "seconds per step"),
    ):
        bars = axes.barh(names, values, color=["C1", *["C0"] * (len(rows) - 1)])
        axes.bar_label(bars, labels=[f"{value:,.3g}" for value in values], padding=3, fontsize=7)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
        axes.grid(axis="y", visible=False)
    memory.invert_yaxis()
    memory.tick_params(axis="y", labelsize=7)
    what = options.model if not options.shape else f"{options.shape}, {options.layers or 'all'} blocks"
    figure.suptitle(f"{what}: {options.batch_size} rows of {options.tokens} tokens, rank 8, Adam, float32")
    return figure, ""


def rows_of(path: Path, data: str, vocabulary: int, shape: tuple[int, int]) -> np.ndarray:
    """int32 [n_rows, T + 1]: the concatenated training texts, cut to one length, so that no graph is traced twice.

    shape: (n_rows, T). If the model has no tokenizer, the tokens are random.
    """
    n_rows, n_tokens = shape
    if not has_tokenizer(path):
        return np.random.default_rng(0).integers(0, vocabulary, (n_rows, n_tokens + 1)).astype(np.int32)
    train = prepare(data, path, RowOptions()).train
    stream: list[int] = []
    for index in np.random.default_rng(0).permutation(len(train)):
        batch = train.batch([index])
        stream += [*batch.tokens[0].tolist(), int(batch.targets[0, -1])]
        if len(stream) >= n_rows * (n_tokens + 1):
            break
    needed = n_rows * (n_tokens + 1)
    return np.resize(np.array(stream, np.int32), needed).reshape(n_rows, n_tokens + 1)


def with_engine(stepper: Stepper, rows: np.ndarray) -> Iterator[float]:
    """Runs the steps of one of our engines; returns loss and seconds of each."""
    size = stepper.config.batch_size
    for step, first in enumerate(range(0, len(rows), size)):
        part = rows[first : first + size]
        yield stepper.step(step, Batch(part[:, :-1], part[:, 1:], rows=("",) * size, n_labels=part[:, 1:].size))
    stepper.close()


def with_mlx_lm(path: Path, lora: Lora, rows: np.ndarray, batch_size: int, in_memory: bool) -> Timed:
    """Runs mlx-lm's trainer; returns loss and seconds of each step."""
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train

    model = mlx_lm_model(path, lora, dequantized=in_memory)
    mx.eval(model.parameters())
    timed: Timed = []

    class Record(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            timed.append((train_info["train_loss"], 1 / train_info["iterations_per_second"]))

    def batches(*_: Any, **__: Any) -> Iterator[tuple[mx.array, mx.array]]:
        for first in range(0, len(rows), batch_size):
            part = mx.array(rows[first : first + batch_size])
            yield part[:, :-1], part[:, 1:]

    def loss(model: nn.Module, tokens: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        return nn.losses.cross_entropy(model(tokens), targets).mean(), mx.array(targets.size)

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArgs(
            batch_size=batch_size,
            iters=len(rows) // batch_size,
            steps_per_report=1,
            steps_per_save=10**9,
            adapter_file=str(Path(scratch) / "adapters.safetensors"),
            grad_checkpoint=not in_memory,
        )
        optimizer = optim.Adam(learning_rate=LEARNING_RATE)
        train(model, optimizer, [None], None, arguments, loss, batches, Record())
    return timed


def measure(case: str, path: Path, data: str, n_steps: int, batch_size: int, n_tokens: int) -> dict[str, Any]:
    """Peak footprint in MB, seconds per step after the first, and the losses."""
    default_cache_bytes = mx.set_cache_limit(0)
    engine = "whole-graph" if case.startswith("checkpoint") else "mebp"
    with PeakMeter() as meter:
        model = mebp_mlx.open_model(path)
        rows = rows_of(path, data, model.spec.V, (n_steps * batch_size, n_tokens))
        if case.startswith("mlx-lm"):
            mx.set_cache_limit(default_cache_bytes)  # MLX's default
            timed = with_mlx_lm(path, mebp_mlx.init_lora(model), rows, batch_size, in_memory=case.endswith("in-memory"))
        else:
            options: dict[str, Any] = {"optimizer": "adam", "learning_rate": LEARNING_RATE, "batch_size": batch_size}
            stepper = Stepper(model, n_tokens, engine=engine, **options)
            if isinstance(stepper.engine, WholeGraphEngine):
                mx.set_cache_limit(default_cache_bytes)
                stepper.engine.last_block_first = case.endswith("last-first")
            timed = _timed(with_engine(stepper, rows))
    return {
        "case": case,
        "peak_mb": round(meter.peak_bytes / 1e6, 1),
        "first_step_s": round(timed[0][1], 3),
        "step_s": report.spread([seconds for _, seconds in timed[1:] or timed], 4),
        "first_loss": round(timed[0][0], 5),
        "last_loss": round(timed[-1][0], 5),
        "n_steps": len(timed),
    }


def _timed(losses: Iterator[float], now: Callable[[], float] = time.perf_counter) -> Timed:
    timed: Timed = []
    before_s = now()
    for loss in losses:
        after_s = now()
        timed.append((loss, after_s - before_s))
        before_s = after_s
    return timed


def contestant(argv: Sequence[str]) -> None:
    """Runs one contestant of `versus` in this process; JSON on the last line."""
    parser = report.Parser("versus contestant", contestant.__doc__)
    parser.add_argument("model", help="folder, hub id, or `bundled`")
    parser.add_argument("--case", required=True, choices=list(CASES))
    _add_run(parser)
    options = parser.parse_args(argv)
    sizes = (options.steps, options.batch_size, options.tokens)
    print(json.dumps(measure(options.case, resolve_model(options.model), options.data, *sizes)))


def measure_in_memory(folder: Path, n_tokens: int, rank: int, n_steps: int) -> dict[str, Any]:
    """Median seconds and ratio; the two losses and the largest gradient difference of the first step."""
    default_cache_bytes = mx.set_cache_limit(OUR_CACHE_BYTES)
    stepper = Stepper(folder, n_tokens, rank=rank, optimizer="sgd")
    theirs = mlx_lm_model(folder, stepper.lora)
    mx.eval(theirs.parameters())
    optimizer = PlainSGD(learning_rate=stepper.config.learning_rate)
    tokens, targets = stepper.batch.tokens, stepper.batch.targets
    ours: dict[str, mx.array] = {}
    sink = stepper.updater.sink

    def recording(gradients: dict[str, mx.array]) -> list[mx.array]:
        if not times:
            ours.update(gradients)
        return sink(gradients)

    stepper.updater.sink = recording  # type: ignore[method-assign]
    value_and_grad = nn.value_and_grad(
        theirs, lambda m: nn.losses.cross_entropy(m(mx.array(tokens)), mx.array(targets)).mean()
    )

    def in_memory() -> float:
        loss, gradients = value_and_grad(theirs)
        if not times:
            expected.update(dict(tree_flatten(gradients)))
        optimizer.update(theirs, gradients)
        mx.eval(loss, theirs.trainable_parameters())
        return loss.item()

    expected: dict[str, mx.array] = {}
    times: list[tuple[float, float]] = []
    losses: list[tuple[float, float]] = []
    for _ in range(n_steps + 1):  # the first step is not counted
        began_s = time.perf_counter()
        loss = stepper.step(0)
        ours_s = time.perf_counter() - began_s
        mx.set_cache_limit(default_cache_bytes)
        began_s = time.perf_counter()
        their_loss = in_memory()
        theirs_s = time.perf_counter() - began_s
        mx.set_cache_limit(OUR_CACHE_BYTES)
        mx.clear_cache()
        times.append((ours_s, theirs_s))
        losses.append((loss, their_loss))
    stepper.close()
    largest = max(float(mx.abs(g).max()) for g in expected.values())
    apart = max(float(mx.abs(ours[name] - expected[name]).max()) for name in expected) / largest
    ratios = sorted(a / b for a, b in times[1:])
    return {
        "ours_s": round(statistics.median(a for a, _ in times[1:]), 2),
        "in_memory_s": round(statistics.median(b for _, b in times[1:]), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "losses": losses[0],
        "gradients_apart": apart,
        "plan": stepper.plan_record,
    }


def in_memory(argv: Sequence[str]) -> None:
    """Our step, compared with mlx-lm's model, decompressed in memory and without checkpointing.

    Both run interleaved in one process with the same BLAS, batch and LoRA: exact gradients of seven projections and an
    SGD update. mlx-lm keeps every weight in float32, all values of the graph, and MLX's default buffer cache.
    """
    parser = report.Parser("in_memory", in_memory.__doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--layers", type=report.positive, help="number of blocks (default: all)")
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    parser.add_argument("--rank", type=report.positive, default=8)
    parser.add_argument("--steps", type=report.positive, default=3)
    parser.add_argument("--model", type=Path, help="folder of an existing model (default: a random one of --shape)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or report.model_of(options.shape, Path(scratch), options.layers)
        result = measure_in_memory(folder, options.tokens, options.rank, options.steps)
    (low, high), losses = result["ratio_range"], result["losses"]
    print(f"plan       {plan_line(result['plan'])}")
    heads = ["ours s", "mlx-lm s", "ratio", "lowest", "highest", "our loss", "mlx-lm's", "gradients differ by"]
    numbers = [result["ours_s"], result["in_memory_s"], result["ratio"], low, high, *(f"{loss:.5f}" for loss in losses)]
    print(report.table(heads, [[*numbers, f"{result['gradients_apart']:.1e} of the largest"]]))
    print(json.dumps({"bench": "in_memory", "shape": options.shape, "tokens": options.tokens, **result}))


PICTURES = {"versus": draw}
BENCHES: dict[str, report.Bench] = {"versus": versus, "in_memory": in_memory, "contestant": contestant}


def main(argv: Sequence[str] | None = None) -> object:
    return report.pick(BENCHES, argv, default="versus")


if __name__ == "__main__":
    report.run(main)
