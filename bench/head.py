"""The head's forward and backward in one pass, against its two matrix products alone at the same BLAS's speed.

Both are timed in one process, by turns; the footprint is what the head adds over what was there before it. One
vocabulary-sized 4-bit matrix with random weights; the bare products are of one chunk's size, on a chunk at hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import mebp_mlx  # isort: skip
import mlx.core as mx
import numpy as np

from bench.layers import trim_heap
from bench.report import positive
from mebp_mlx.kernels.cpu import online_softmax
from mebp_mlx.kernels.online_softmax import SoftmaxState
from mebp_mlx.ops.barrier import Barrier
from mebp_mlx.ops.cross_entropy import cross_entropy
from mebp_mlx.ops.plan import Plan
from mebp_mlx.system.footprint import PeakMeter
from mebp_mlx.testing.synth import SHAPES, write_model


def measure(folder: Path, n_tokens: int, repeats: int) -> dict[str, float]:
    """Median seconds of the head and of its products, the median of their ratios, and the MB that the head adds."""
    model, plan = mebp_mlx.open_model(folder), Plan()
    D, V = model.spec.D, model.spec.V
    rng = np.random.default_rng(0)
    targets = rng.integers(0, V, (1, n_tokens)).astype(np.int32)
    x = mx.array(rng.standard_normal((1, n_tokens, D), np.float32))
    chunk = plan.vocabulary_chunk(n_tokens, model.copied_bytes(model.spec.head, D), model.dtype.size)

    def whole() -> float:
        began_s = time.perf_counter()
        cross_entropy(model, plan, Barrier(plan.grain), [x], targets, need_dx=True)
        return time.perf_counter() - began_s

    def products() -> float:
        h, w = x[0], mx.random.normal((chunk, D))
        mx.eval(h, w)
        began_s = time.perf_counter()
        for _ in range(V // chunk):
            z = h @ w.T
            mx.eval(z)
            mx.eval(z @ w)
        return (time.perf_counter() - began_s) * V / (V // chunk * chunk)

    def decompress() -> float:
        began_s = time.perf_counter()
        for first in range(0, V, chunk):
            mx.eval(model.rows(model.spec.head, first, min(first + chunk, V)))
        return time.perf_counter() - began_s

    def exp() -> float:
        state, labels = SoftmaxState.start(n_tokens, D, False), mx.array(targets[0])
        began_s = time.perf_counter()
        for _ in range(V // chunk):
            step = online_softmax(mx.zeros((n_tokens, chunk)), *state.softmax, labels, 0)
            mx.eval(step)
        return (time.perf_counter() - began_s) * V / (V // chunk * chunk)

    products()  # the BLAS keeps buffers of its own, which are no part of the head
    trim_heap()  # of what setting up has left in it
    with PeakMeter() as meter:
        before_bytes = meter.now_bytes
        with meter.phase("head"):
            whole()
        added_bytes = meter.phases["head"] - before_bytes
    pairs = [(whole(), products()) for _ in range(repeats)]
    parts = {"decompress_s": decompress, "exp_s": exp}
    parts_s = {name: round(statistics.median(part() for _ in range(repeats)), 3) for name, part in parts.items()}
    head_s, products_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "head_s": round(head_s, 3),
        "products_s": round(products_s, 3),
        "products_gflops": round(4 * n_tokens * D * V / products_s / 1e9, 1),
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "added_mb": round(added_bytes / 1e6, 1),
        **parts_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.head", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--tokens", type=positive, default=256)
    parser.add_argument("--repeats", type=positive, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(options.shape, Path(scratch) / "model", layers=1)
        found = measure(folder, options.tokens, options.repeats)
    print(
        f"{options.shape}, T = {options.tokens}: head {found['head_s']} s, its two products {found['products_s']} s "
        f"({found['products_gflops']} GFLOP/s), ratio {found['ratio']}, {found['added_mb']} MB added; "
        f"decompressing alone {found['decompress_s']} s, exp alone {found['exp_s']} s, both on one core"
    )
    print(json.dumps({"bench": "head", "shape": options.shape, "tokens": options.tokens, **found}))


if __name__ == "__main__":
    main()
