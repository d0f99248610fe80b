"""`python -m bench.in_memory`: our step against mlx-lm's own model held decompressed in memory, without checkpointing.

Both in one process, by turns, with the same BLAS, the same batch and the same LoRA: exact gradients of seven
projections and an update by SGD. Theirs keeps every weight in float32 and the whole graph's values, with MLX's own
buffer cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mebp_mlx  # noqa: F401  # isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from bench import report
from bench.stepper import Stepper, plan_line
from mebp_mlx.testing.reference import mlx_lm_model
from mebp_mlx.testing.synth import SHAPES
from mebp_mlx.training.optimizers import PlainSGD

OUR_CACHE_BYTES = 0  # system/allocator.py


def measure(folder: Path, n_tokens: int, rank: int, n_steps: int) -> dict[str, Any]:
    """Medians of seconds and of the ratio; the two losses and the largest difference of the first step's gradients."""
    default_cache_bytes = mx.set_cache_limit(OUR_CACHE_BYTES)
    stepper = Stepper(folder, n_tokens, rank=rank, optimizer="sgd")
    theirs = mlx_lm_model(folder, stepper.lora)
    optimizer = PlainSGD(learning_rate=stepper.config.learning_rate)
    tokens, targets = stepper.batch.tokens, stepper.batch.targets
    found: dict[str, mx.array] = {}
    sink = stepper.updater.sink

    def recording(gradients: dict[str, mx.array]) -> list[mx.array]:
        if not times:
            found.update(gradients)
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
    for _ in range(n_steps + 1):  # the first is not counted
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
    apart = max(float(mx.abs(found[name] - expected[name]).max()) for name in expected) / largest
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--layers", type=report.positive, help="blocks (default: all)")
    parser.add_argument("--tokens", type=report.positive, default=256)
    parser.add_argument("--rank", type=report.positive, default=8)
    parser.add_argument("--steps", type=report.positive, default=3)
    parser.add_argument("--model", type=Path, help="a model already written (default: one of --shape)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or report.model_of(options.shape, Path(scratch), options.layers)
        found = measure(folder, options.tokens, options.rank, options.steps)
    print(
        f"{options.shape}, T = {options.tokens}: ours {found['ours_s']} s, mlx-lm's model in memory "
        f"{found['in_memory_s']} s, ratio {found['ratio']} ({found['ratio_range'][0]} to {found['ratio_range'][1]}); "
        f"losses {found['losses'][0]:.5f} and {found['losses'][1]:.5f}, gradients apart by "
        f"{found['gradients_apart']:.1e} of the largest"
    )
    print(f"plan       {plan_line(found['plan'])}")
    print(json.dumps({"bench": "in_memory", "shape": options.shape, "tokens": options.tokens, **found}))


if __name__ == "__main__":
    main()
