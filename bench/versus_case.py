"""`python -m bench.versus_case MODEL --case NAME`: N training steps of one contestant of bench.versus; JSON at the end.

All start from the same LoRA values, see the same rows in the same order, compute in float32 with the same BLAS and
update with mlx.optimizers' Adam. Rows are the texts' tokens put end to end and cut to one length, so that nobody
traces a graph anew for another shape; a model without a tokenizer gets random tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mebp_mlx  # isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from bench.in_memory import mlx_lm_model
from bench.report import positive, refuse, spread
from bench.stepper import Stepper
from mebp_mlx.data.dataset import Batch, has_tokenizer, prepare
from mebp_mlx.data.rows import RowOptions
from mebp_mlx.engine.whole_graph import WholeGraphEngine
from mebp_mlx.errors import UserError
from mebp_mlx.model.lora import Lora
from mebp_mlx.system.footprint import PeakMeter
from mebp_mlx.weights.hub import resolve_model

CASES = {
    "ours": "mebp_mlx",
    "checkpoint-last-first": "whole graph, mx.checkpoint a block, last block's gradients first",
    "checkpoint-at-once": "whole graph, mx.checkpoint a block, all gradients at once",
    "mlx-lm-4bit": "mlx-lm's trainer, packed weights, its checkpointing",
    "mlx-lm-in-memory": "mlx-lm's trainer, decompressed in memory, no checkpointing",
}
LEARNING_RATE = 1e-4
Timed = list[tuple[float, float]]  # (loss, seconds) of each step


def rows_of(path: Path, data: str, vocabulary: int, shape: tuple[int, int]) -> np.ndarray:
    """int32 [n_rows, T + 1] of the training texts, or random for a model without a tokenizer."""
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
    """The loss of each step of one of our engines."""
    size = stepper.config.batch_size
    for step, first in enumerate(range(0, len(rows), size)):
        part = rows[first : first + size]
        yield stepper.step(step, Batch(part[:, :-1], part[:, 1:], rows=("",) * size, n_labels=part[:, 1:].size))
    stepper.close()


def with_mlx_lm(path: Path, lora: Lora, rows: np.ndarray, batch_size: int, in_memory: bool) -> Timed:
    """mlx-lm's own trainer."""
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train

    model = mlx_lm_model(path, lora, unpacked=in_memory)
    found: Timed = []

    class Record(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            found.append((train_info["train_loss"], 1 / train_info["iterations_per_second"]))

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
    return found


def measure(case: str, path: Path, data: str, n_steps: int, batch_size: int, n_tokens: int) -> dict[str, Any]:
    """Peak footprint, seconds a step after the first, and the losses."""
    default_cache_bytes = mx.set_cache_limit(0)
    engine = "whole-graph" if case.startswith("checkpoint") else "mebp"
    with PeakMeter() as meter:
        model = mebp_mlx.open_model(path)
        rows = rows_of(path, data, model.spec.V, (n_steps * batch_size, n_tokens))
        if case.startswith("mlx-lm"):
            mx.set_cache_limit(default_cache_bytes)  # as everybody has it who does not set it
            found = with_mlx_lm(path, mebp_mlx.init_lora(model), rows, batch_size, in_memory=case.endswith("in-memory"))
        else:
            options: dict[str, Any] = {"optimizer": "adam", "learning_rate": LEARNING_RATE, "batch_size": batch_size}
            stepper = Stepper(model, n_tokens, engine=engine, **options)
            if isinstance(stepper.engine, WholeGraphEngine):
                mx.set_cache_limit(default_cache_bytes)
                stepper.engine.last_block_first = case.endswith("last-first")
            found = _timed(with_engine(stepper, rows))
    return {
        "case": case,
        "peak_mb": round(meter.peak_bytes / 1e6, 1),
        "first_step_s": round(found[0][1], 3),
        "step_s": spread([seconds for _, seconds in found[1:] or found], 4),
        "first_loss": round(found[0][0], 5),
        "last_loss": round(found[-1][0], 5),
        "n_steps": len(found),
    }


def _timed(losses: Iterator[float], now: Callable[[], float] = time.perf_counter) -> Timed:
    found: Timed = []
    before_s = now()
    for loss in losses:
        after_s = now()
        found.append((loss, after_s - before_s))
        before_s = after_s
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.versus_case", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder, hub id, or `bundled`")
    parser.add_argument("--case", required=True, choices=list(CASES))
    parser.add_argument("--data", default="bundled")
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--batch-size", type=positive, default=4)
    parser.add_argument("--tokens", type=positive, default=128)
    options = parser.parse_args()
    try:
        path = resolve_model(options.model)
        found = measure(options.case, path, options.data, options.steps, options.batch_size, options.tokens)
    except UserError as error:
        refuse(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
